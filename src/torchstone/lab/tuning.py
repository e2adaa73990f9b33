"""Select each arm's peak learning rate on seeds of its own.

An arm that looks better only because the shared rate suits it is the commonest false result in comparisons. Tuning
trains every arm at every rate of a declared grid, on seeds that the comparison never uses, and takes the rate with the
best mean of the metric (ties: the lower rate). Every arm gets the same grid and the same number of tuning runs.

Pitfall: a best rate at the edge of the grid means that the grid was too narrow; the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchstone.errors import StudyError
from torchstone.lab.progress import Progress
from torchstone.lab.record import Outcome
from torchstone.lab.runner import RunOptions, StudyRun
from torchstone.lab.study import Arm, Cell, Measurement, Resources, Scale, Study
from torchstone.lab.training import TrainingStudy, Tuned
from torchstone.recipe.load import load_recipe
from torchstone.report.result import Metric, Table

FIRST_TUNING_SEED = 1_000_000
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


class RateSearch(Study):
    """The tuning cells of a training study, as a study without claims."""

    claims = ()

    def __init__(self, study: TrainingStudy, scale: Scale, grid: Sequence[float]) -> None:
        self.title = f"Learning rates: {study.title}"
        self.question = ""
        self.metrics = study.metrics
        self.scales = {"tuning": scale}
        self.inner, self.grid = study, tuple(grid)
        self.baseline = tuning_name(study.baseline, self.grid[0])

    def arms(self, scale: Scale) -> Sequence[Arm]:
        """Every arm at every rate."""
        return [at_rate(arm, rate) for arm in self.inner.arms(scale) for rate in self.grid]

    def prepare(self, arms: Sequence[Arm], settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """The worker prepares the inner study (see `reference`)."""
        return self.inner.prepare(arms, settings, directory)

    def measure(self, cell: Cell) -> Measurement:
        """The worker measures the inner study (see `reference`)."""
        return self.inner.measure(cell)

    def reference(self) -> dict[str, Any]:
        """The inner study: a tuning cell is an ordinary cell with another rate and seed."""
        return self.inner.reference()

    def identity(self) -> dict[str, Any]:
        """The inner study's, and the grid."""
        return {**self.inner.identity(), "grid": list(self.grid)}

    def resources(self, arms: Sequence[Arm]) -> Resources:
        """The inner study's."""
        return self.inner.resources(arms)


def tuning_name(arm: str, rate: float) -> str:
    """Name of a tuning arm."""
    return f"{arm}.rate-{rate:g}"


def at_rate(arm: Arm, rate: float) -> Arm:
    """The arm with another peak learning rate."""
    recipe = load_recipe(arm.settings["recipe"], [f"optimizer.learning_rate={rate!r}"])
    return replace(arm, name=tuning_name(arm.name, rate), settings={**arm.settings, "recipe": recipe.data_dict()})


def tune(
    study: TrainingStudy,
    scale: Scale,
    grid: Sequence[float],
    seeds: int,
    metric: Metric,
    options: RunOptions,
    progress: Progress,
) -> Tuned:
    """Run the tuning cells in `options.out`/tuning and select.

    Raises:
        StudyError: an arm has no rate at which every tuning seed finished.
    """
    search = RateSearch(study, scale, grid)
    assert options.out is not None
    run = StudyRun(search, replace(options, scale="tuning", out=Path(options.out) / "tuning"), progress)
    run.open()
    with run.executor() as executor:
        run.prepare(executor)
        tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
        outcomes = run.run_cells(executor, tuning_seeds, "tuning learning rates")
    names = [arm.name for arm in study.arms(scale)]
    return replace(select(names, grid, outcomes, metric), grid=tuple(grid), seeds=seeds)


def select(
    arms: Sequence[str], grid: Sequence[float], outcomes: Mapping[tuple[str, int], Outcome], metric: Metric
) -> Tuned:
    """The rate with the best mean metric for each arm (ties: the lower rate), among rates at which every seed finished."""
    rates: dict[str, float] = {}
    sign = -1 if metric.better == "higher" else 1
    notes = [
        f"The peak learning rate was selected for each arm on separate seeds from the grid {', '.join(f'{r:g}' for r in grid)}."
    ]
    rows = []
    for arm in arms:
        means: dict[float, float | None] = {}
        for rate in grid:
            cells = [outcome.measurement for (name, _), outcome in outcomes.items() if name == tuning_name(arm, rate)]
            finished = [cell.metrics[metric.name] for cell in cells if cell is not None]
            means[rate] = sum(finished) / len(finished) if finished and len(finished) == len(cells) else None
        usable = {rate: mean for rate, mean in means.items() if mean is not None}
        if not usable:
            raise StudyError(
                f"arm {arm!r} failed at every learning rate of the grid; see the cells' errors, or lower the grid."
            )
        rates[arm] = min(usable, key=lambda rate: (sign * usable[rate], rate))
        if rates[arm] in (min(grid), max(grid)):
            notes.append(
                f"Arm {arm}: the best rate {rates[arm]:g} lies at the edge of the grid; a wider one may do better."
            )
        rows.append((arm, *(means[rate] for rate in grid), rates[arm]))
    columns = ("arm", *(f"{rate:g}" for rate in grid), "selected")
    return Tuned(
        rates,
        tuple(notes),
        Table(title=f"Tuning: mean {metric.label} by peak learning rate", columns=columns, rows=tuple(rows)),
    )
