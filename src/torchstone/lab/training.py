"""Studies whose arms are trained models: a base recipe, and variants that differ from it in marked lines.

All arms of a seed see the same tokens in the same order and start from the same values wherever parameter names and
shapes agree. Precision and compilation are chosen once, on the baseline, and pinned for every arm, so that arms never
differ in arithmetic. An arm is matched to the baseline (see `torchstone.lab.matching`) before anything runs.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchstone.errors import ConfigError, DataError
from torchstone.lab import matching
from torchstone.lab.study import Arm, Cell, Measurement, Resources, Scale, Study
from torchstone.recipe.diff import differences
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.report.result import ArmRecord, Change, Figure, Line, Match, Series, Table

if TYPE_CHECKING:
    from torchstone.data.batch import Batch
    from torchstone.models.decoder import Decoder
    from torchstone.train.loop import Callback
    from torchstone.train.run import RunSummary

SMALL_PARAMETERS = 30_000_000
CURVE_POINTS = 100
STREAM = 10_000_000  # seeds between two streams


@dataclass(frozen=True)
class Variant:
    """An arm as overrides on another arm's recipe.

    Attributes:
        name: of the arm.
        overrides: `key=value` lines; none for the baseline.
        role: `baseline`, `arm` or `control`.
        note: one line for the reader.
        matched: False leaves the arm as large as the overrides make it.
        on: what this arm is matched in; None: what the study's matching says.
        against: the arm that this one changes and is matched to; empty: the study's baseline.
        stream: arms of different streams share no seed: what two equal arms differ by is then chance alone (A/A tests).
    """

    name: str
    overrides: tuple[str, ...] = ()
    role: str = "arm"
    note: str = ""
    matched: bool = True
    on: matching.On | None = None
    against: str = ""
    stream: int = 0


@dataclass(frozen=True)
class Matching:
    """How arms are matched to the baseline: what agrees, what may change, how closely."""

    on: matching.On
    free: matching.Free = "feedforward"
    tolerance: float = matching.TOLERANCE


@dataclass(frozen=True)
class Trained:
    """A finished training cell, for `TrainingStudy.probe`."""

    cell: Cell
    recipe: Recipe
    model: Decoder
    data: Any
    summary: RunSummary

    def accuracy(self, batches: Iterable[Batch]) -> float:
        """Share of the batches' targets that the model ranks first."""
        import torch

        objective = self.recipe.objective.build()
        with torch.no_grad():
            outputs = [objective(self.model, batch) for batch in batches]
        return float(sum(output.correct_bt.sum() for output in outputs)) / float(
            sum(output.count for output in outputs)
        )


@dataclass(frozen=True)
class Probe:
    """Numbers that a study takes from the trained model, beside the training record."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """What tuning selected (see `torchstone.lab.tuning`): a rate for each arm, notes, all numbers, the grid if it was given, and
    seeds."""

    rates: Mapping[str, float]
    notes: tuple[str, ...]
    table: Table
    grid: tuple[float, ...] = ()
    seeds: int = 0


class TrainingStudy(Study):
    """A subclass gives `base`, `variants` and, if it looks into the models, `probe`."""

    matching: Matching | None = None
    tuned: Tuned | None = None

    @abstractmethod
    def base(self, scale: Scale) -> Recipe:
        """The baseline's recipe at this scale."""

    @abstractmethod
    def variants(self, scale: Scale) -> Sequence[Variant]:
        """All arms, the baseline (no overrides) among them."""

    def probe(self, trained: Trained) -> Probe:
        """Numbers from the trained model. Nothing by default."""
        return Probe()

    def callbacks(self, cell: Cell) -> Sequence[Callback]:
        """What looks at the cell's run while it trains. Nothing by default."""
        return ()

    def arms(self, scale: Scale) -> Sequence[Arm]:
        """Every variant resolved to a complete, matched recipe; a variant comes after the one that it changes."""
        recipes: dict[str, Recipe] = {}
        arms = []
        for variant in self.variants(scale):
            first = variant.name == self.baseline
            origin = self.base(scale) if first else recipes[variant.against or self.baseline]
            recipe = self._at_rate(load_recipe(origin, variant.overrides), variant.name)
            record: Match | None = None
            if self.matching is not None and variant.matched and not first:
                on = variant.on or self.matching.on
                recipe, record = matching.match(origin, recipe, on, self.matching.free, self.matching.tolerance)
            recipes[variant.name] = recipe
            arms.append(_arm(variant, origin, recipe, record))
        return arms

    def _at_rate(self, recipe: Recipe, arm: str) -> Recipe:
        if self.tuned is None:
            return recipe
        return load_recipe(recipe, [f"optimizer.learning_rate={self.tuned.rates[arm]!r}"])

    def arm_record(self, arm: Arm) -> ArmRecord:
        """Size, cost, intervention, match and learning rate of an arm."""
        recipe = load_recipe(arm.settings["recipe"])
        counts = matching.counts_of(recipe)
        return ArmRecord(
            name=arm.name,
            role=arm.role,
            note=arm.note,
            intervention=tuple(Change.model_validate(change) for change in arm.settings["intervention"]),
            parameters=counts.parameters,
            active_parameters=counts.active_parameters if counts.active_parameters < counts.parameters else None,
            flops_per_token=counts.training_flops_per_token,
            match=Match.model_validate(arm.settings["match"]) if arm.settings["match"] else None,
            learning_rate=getattr(recipe.optimizer, "learning_rate", None),
            learning_rate_policy="tuned" if self.tuned else "shared",
        )

    def notes(self) -> tuple[str, ...]:
        """Says whether each arm had its learning rate tuned."""
        if self.tuned is not None:
            return self.tuned.notes
        return (
            "The peak learning rate was shared by all arms and not tuned: an arm may win because the rate suits it. "
            "`--tune` selects a rate for each arm on separate seeds.",
        )

    def recipe_yaml(self, arms: Sequence[Arm]) -> str:
        """The baseline's recipe."""
        baseline = next(arm for arm in arms if arm.name == self.baseline)
        return dump_yaml(load_recipe(baseline.settings["recipe"]))

    def resources(self, arms: Sequence[Arm]) -> Resources:
        """One thread for small models on a CPU, all cores for large ones, one GPU each where there are any."""
        from torchstone.lab.environment import cores
        from torchstone.recipe.fingerprint import device_class

        if device_class() == "cuda":
            import torch

            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
            return Resources(devices=tuple(names))
        largest = max(matching.counts_of(load_recipe(arm.settings["recipe"])).parameters for arm in arms)
        return Resources(threads=1 if largest < SMALL_PARAMETERS else cores())

    def prepare(self, arms: Sequence[Arm], settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """Build every arm's data once, and choose precision and compilation on the baseline."""
        from torchstone.train.precision import choose_compute

        recipes = {arm.name: load_recipe(arm.settings["recipe"]) for arm in arms}
        fingerprints = {name: recipe.data.build(None).fingerprint for name, recipe in recipes.items()}
        baseline = next((arm.name for arm in arms if arm.role == "baseline"), arms[0].name)
        return {"compute": choose_compute(recipes[baseline]).data(), "data": fingerprints}

    def measure(self, cell: Cell) -> Measurement:
        """Train the cell's recipe with its seed and take its numbers."""
        from torchstone.train.precision import Compute
        from torchstone.train.run import load_run, train

        seed = cell.seed + STREAM * cell.arm.settings["stream"]
        recipe = load_recipe(cell.arm.settings["recipe"], [f"seed={seed}"])
        expected, found = cell.prepared["data"][cell.arm.name], recipe.data.build(None).fingerprint
        if found != expected:
            raise DataError(
                f"the data of arm {cell.arm.name} changed since the study was prepared: its fingerprint was {expected}, now "
                f"it is {found}. Restore the files, or choose another --out: cells on different data are never mixed."
            )
        summary = train(
            recipe,
            cell.directory / "run",
            compute=Compute(**cell.prepared["compute"]),
            callbacks=self.callbacks(cell),
            progress=cell.report,
            device=None,
        )
        recipe, model, data = load_run(cell.directory / "run")
        probed = self.probe(Trained(cell, recipe, model, data, summary))
        return Measurement(
            metrics={**summary.final, **probed.metrics},
            items=probed.items,
            series={**curves(summary.history), **probed.series},
            extra=probed.extra,
            tokens=summary.tokens,
            flops=summary.flops,
            peak_bytes=summary.peak_bytes,
        )


def _arm(variant: Variant, origin: Recipe, recipe: Recipe, record: Match | None) -> Arm:
    changes = [
        Change(path=path, baseline=before, value=after).model_dump(mode="json")
        for path, before, after in differences(origin, recipe)
    ]
    settings = {
        "recipe": recipe.data_dict(),
        "stream": variant.stream,
        "intervention": changes,
        "match": record.model_dump(mode="json") if record else None,
    }
    return Arm(variant.name, variant.role, variant.note, settings)  # type: ignore[arg-type]


def curves(history: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Series]:
    """Training and validation loss as series against steps, tokens, FLOPs and seconds, thinned to `CURVE_POINTS`.

    The run directory's metrics hold every step.
    """
    found = {}
    for name, record in history.items():
        kept = thinned(len(record["loss"]))
        if kept:
            axes = {axis: tuple(record[axis][i] for i in kept) for axis in ("steps", "tokens", "flops", "seconds")}
            found[f"{name} loss"] = Series(axes=axes, values=tuple(record["loss"][i] for i in kept))
    return found


def thinned(count: int) -> list[int]:
    """Indices of at most `CURVE_POINTS` evenly spread points, the first and the last among them."""
    if count <= CURVE_POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)]


def depth_figure(cells: Sequence[tuple[Cell, Measurement]], name: str, title: str, label: str) -> tuple[Figure, ...]:
    """A model's own number (`layer03/lambda` in `extra`) against the layer, mean and range over seeds; none if no arm has it."""
    found: dict[str, list[list[float]]] = {}
    for cell, measurement in cells:
        values = [value for key, value in sorted(measurement.extra.items()) if key.endswith(f"/{name}")]
        if values:
            found.setdefault(cell.arm.name, []).append(values)
    lines = tuple(
        Line(
            name=arm,
            x=tuple(range(len(rows[0]))),
            y=tuple(sum(column) / len(column) for column in zip(*rows, strict=True)),
            low=tuple(map(min, zip(*rows, strict=True))),
            high=tuple(map(max, zip(*rows, strict=True))),
        )
        for arm, rows in found.items()
    )
    return (
        (Figure(title=title, x_label="layer", y_label=label, lines=lines, note="mean and range over seeds"),)
        if lines
        else ()
    )


def require_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """A learning-rate grid as a sorted tuple; raises ConfigError if it is empty, unsorted in sign or repeated."""
    rates = tuple(sorted(grid))
    if len(rates) < 2 or rates[0] <= 0 or len(set(rates)) != len(rates):
        raise ConfigError(f"a learning-rate grid has at least two different positive rates; given: {list(grid)}.")
    return rates
