"""Measuring of the WSD-S study: the sweep of peaks on seeds of their own, and one protocol's cell on either half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchstone.data.synthetic.mixed_bigram import MixedBigram, MixedBigramConfig
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.landscape.curvature import TensorLoss, curvature
from torchstone.diagnose.landscape.directions import cosine, norm, random_like
from torchstone.diagnose.landscape.finding import token_loss
from torchstone.diagnose.landscape.interpolate import LossLine, interpolate, loss_of
from torchstone.diagnose.landscape.split import EntropySplit, entropy_split
from torchstone.diagnose.landscape.states import State, difference, parameters_of
from torchstone.lab.study import Arm, Cell, Measurement
from torchstone.report.result import Metric, Series
from torchstone.studies._wsd_s_plans import Factors, Plan, follow, partings, plan_of
from torchstone.studies._wsd_s_table import TableLearner, TableLook
from torchstone.studies._wsd_s_text import TextLearner, base
from torchstone.train.budget import counts_of

SWEPT = ("wsd-s", "wsd", "cyclic", "oracle", "wsd-free", "wsd-s-rewarmed")
PEAK_OF = {"constant": "wsd"}  # an arm that takes another one's peak
TUNING = 1_000_000  # first seed of the sweep; the reference model has the seed before
CURVED = 16  # held-out sequences on which curvature is measured
ALPHAS = (-0.25, *(i / 8 for i in range(9)), 1.25)
METRICS = (
    *(Metric(name=f"loss_{j}", label=f"held-out loss at budget {j}", unit="nats/token") for j in (1, 2, 3)),
    *(Metric(name=f"excess_{j}", label=f"exact excess loss at budget {j}", unit="nats/token") for j in (1, 2, 3)),
    Metric(name="plateau_gap", label="plateau: fall of ln excess, certain above uncertain", better="neither"),
    Metric(name="decay_gap", label="decay: fall of ln excess, uncertain above certain", better="neither"),
    Metric(name="decile_gap", label="decay: drop in the top decile minus twice that in the bottom decile (0 if that rose)",
           unit="nats/token", better="neither"),
    Metric(name="bulge", label="line between decayed checkpoints above its chord", unit="nats/token"),
    Metric(name="climb", label="line between decayed checkpoints above the earlier one", unit="nats/token"),
    Metric(name="steepness", label="curvature along the decay minus that along as many steps before it",
           better="neither"),
    Metric(name="valley", label="middle of two plateau iterates minus the better one", unit="nats/token", better="neither"),
)  # fmt: skip

Curve = dict[tuple[int, int], Any]  # (run, step) → what was seen there


def arms_of(language: str, protocols: Mapping[str, str], roles: Mapping[str, str]) -> list[Arm]:
    """One arm for every protocol of a language."""
    prefix = "" if language == "text" else f"{language}."
    return [
        Arm(f"{prefix}{name}", roles.get(name, "arm"), note, {"language": language, "protocol": name})  # type: ignore[arg-type]
        for name, note in protocols.items()
    ]


def table_tasks(s: Mapping[str, Any], seed: int) -> list[MixedBigram]:
    """The mixed bigram languages of a seed, one for each of its tables."""
    return [
        MixedBigramConfig(vocab_size=s["vocab"], pairs=s["batch"], table_seed=1000 * seed + replica).build()
        for replica in range(s["replicas"])
    ]


def learner_of(language: str, s: Mapping[str, Any], seed: int, peak: float) -> TableLearner | TextLearner:
    """An untrained learner."""
    if language == "table":
        return TableLearner(table_tasks(s, seed), seed, peak, s["batch"])
    return TextLearner(base(s).data_dict(), seed, peak)


def prepare(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Sweep both halves, and train the reference model of the text half.

    Returns:
        `peaks`: language → protocol → the best peak; `sweep`: all losses as rows; `reference`: a file with the reference model's
        weights and its entropy at every held-out target.
    """
    peaks, rows = {}, []
    for language in ("table", "text"):
        losses = _sweep(language, settings[language])
        rows += [[language, name, peak, loss] for name, found in losses.items() for peak, loss in found.items()]
        peaks[language] = {name: min(found, key=found.__getitem__) for name, found in losses.items()}
    path = directory / "reference.safetensors"
    s = settings["text"]
    learner = TextLearner(base(s).data_dict(), TUNING - 1, peaks["text"]["oracle"])
    follow((plan_of("oracle", s).runs[-1],), learner, lambda run: set(), lambda run, step: None)
    weights = {f"model.{name}": value.cpu().contiguous() for name, value in learner.weights().items()}
    save_file({**weights, "entropy": learner.entropies()}, path)
    return {"peaks": peaks, "sweep": rows, "reference": str(path)}


def _sweep(language: str, s: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """Protocol → peak → loss at the last swept budget, mean over the sweep's seeds."""
    runs = [plan_of(name, s, s["sweep_budgets"]).runs[-1] for name in SWEPT]
    losses: dict[str, dict[float, float]] = {name: dict.fromkeys(s["peaks"], 0.0) for name in SWEPT}
    for seed in range(TUNING, TUNING + s["sweep_seeds"]):
        for peak in s["peaks"]:
            learner = learner_of(language, s, seed, peak)

            def look(run: int, step: int, learner: Any = learner, peak: float = peak) -> None:
                losses[SWEPT[run]][peak] += _tuning_loss(learner) / s["sweep_seeds"]

            follow(runs, learner, lambda run: {len(runs[run])}, look)
    return losses


def _tuning_loss(learner: TableLearner | TextLearner) -> float:
    """What peaks are chosen by: exact in tables, on text of held-out windows that judge no cell."""
    if isinstance(learner, TableLearner):
        return learner.look().excess.total
    return float(learner.losses(tuning=True).mean())


def peak_of(cell: Cell) -> float:
    """The peak that the sweep chose for a cell's protocol."""
    name = cell.arm.settings["protocol"]
    return float(cell.prepared["peaks"][cell.arm.settings["language"]][PEAK_OF.get(name, name)])


def measure(cell: Cell) -> Measurement:
    """Train one protocol with one seed, at the peak that the sweep chose for it."""
    language, name = cell.arm.settings["language"], cell.arm.settings["protocol"]
    s = cell.settings[language]
    plan, peak = plan_of(name, s), peak_of(cell)
    learner = learner_of(language, s, cell.seed, peak)
    seen: Curve = {}

    def look(run: int, step: int) -> None:
        seen[run, step] = learner.look() if isinstance(learner, TableLearner) else _text_look(learner, plan, run, step)
        cell.report({"step": step, "steps": len(plan.runs[-1])})

    every = s["every"]
    follow(plan.runs, learner, lambda run: {*_marks(plan, run), *range(0, len(plan.runs[run]), every)}, look)
    filled = {(run, step): look for run in range(len(plan.runs)) for step, look in _path(plan.runs, seen, run)}
    if isinstance(learner, TableLearner):
        return table_measurement(learner.entropy_rv, learner.frequency_rv, plan, peak, filled)
    return _text_measurement(cell, learner, plan, peak, filled)


def _marks(plan: Plan, run: int) -> tuple[int, int, int]:
    """Where a run's decay begins, where it ends, and as long before it on the plateau."""
    before, end = plan.before[run], len(plan.runs[run])
    return before, end, max(0, 2 * before - end)


def _path(runs: Sequence[Factors], seen: Curve, run: int) -> list[tuple[int, Any]]:
    """All looks on the way to the end of a run, those of the runs that it parted from included."""
    parent, start = partings(runs)[run]
    before = [] if parent < 0 else [(step, look) for step, look in _path(runs, seen, parent) if step <= start]
    own = [(step, look) for (which, step), look in sorted(seen.items(), key=lambda item: item[0]) if which == run]
    return sorted(dict([*before, *own]).items())


def _series(run: Factors, peak: float, values: Mapping[int, float]) -> Series:
    """A curve against steps and against the area under the schedule (sum of rates)."""
    area = [0.0, *accumulate(factor * peak for factor in run)]
    steps = tuple(sorted(values))
    axes = {"steps": tuple(map(float, steps)), "area": tuple(area[step] for step in steps)}
    return Series(axes=axes, values=tuple(values[step] for step in steps))


def decile_gap(split: EntropySplit) -> float:
    """Drop in the top decile minus twice that in the bottom one; a bottom decile that rose counts as one that stayed."""
    return split.drop_top - 2 * max(0.0, split.drop_bottom)


def table_measurement(entropy_rv: Tensor, frequency_rv: Tensor, plan: Plan, peak: float, seen: Curve) -> Measurement:
    """The numbers of a table cell from what was seen of it."""
    ends = [seen[j, len(run)].excess for j, run in enumerate(plan.runs)]
    befores = [seen[j, step].excess for j, step in enumerate(plan.before)]
    last = len(plan.runs) - 1
    metrics = {f"excess_{j + 1}": excess.total for j, excess in enumerate(ends)}
    before: TableLook = seen[last, plan.before[last]]
    after: TableLook = seen[last, len(plan.runs[last])]
    split = entropy_split(before.losses_rv, after.losses_rv, entropy_rv, frequency_rv)
    if plan.before[last] < len(plan.runs[last]):
        metrics["decile_gap"] = decile_gap(split)
        metrics["decay_gap"] = _fall(befores[last].uncertain, ends[last].uncertain) - _fall(
            befores[last].certain, ends[last].certain
        )
    if plan.before[0] > 0:
        metrics["plateau_gap"] = _fall(befores[0].certain, befores[last].certain) - _fall(
            befores[0].uncertain, befores[last].uncertain
        )
    run = plan.runs[last]
    series = {
        name: _series(run, peak, {step: getattr(look.excess, part) for (j, step), look in seen.items() if j == last})
        for name, part in (("excess", "total"), ("certain excess", "certain"), ("uncertain excess", "uncertain"))
    }
    extra = {
        "peak": peak, "cost": plan.cost, "split": _split_data(split),
        "ends": [[e.total, e.certain, e.uncertain] for e in ends],
        "befores": [[e.total, e.certain, e.uncertain] for e in befores],
    }  # fmt: skip
    return Measurement(metrics=metrics, series=series, extra=extra)


def _fall(before: float, after: float) -> float:
    """ln before/after of two positive numbers."""
    return float(torch.log(torch.tensor(before, dtype=torch.float64) / after))


def _split_data(split: EntropySplit) -> dict[str, list[float]]:
    return {"entropy": list(split.entropy), "change": list(split.change)}


def _text_look(learner: TextLearner, plan: Plan, run: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every held-out target, and the weights where lines or splits need them."""
    kept = step in _marks(plan, run)
    return learner.losses(), learner.weights() if kept else {}


def _text_measurement(cell: Cell, learner: TextLearner, plan: Plan, peak: float, seen: Curve) -> Measurement:
    last = len(plan.runs) - 1
    ends = [seen[j, len(run)] for j, run in enumerate(plan.runs)]
    befores = [seen[j, step] for j, step in enumerate(plan.before)]
    reference = load_file(cell.prepared["reference"])
    split = entropy_split(befores[last][0], ends[last][0], reference["entropy"])
    lines: dict[str, LossLine] = {}
    directions: dict[str, list[float]] = {}
    loss_fn = loss_of(learner.model, lambda: float(learner.losses().mean()))
    if cell.arm.settings["protocol"] == "wsd-s":
        stranger = {name.removeprefix("model."): value for name, value in reference.items() if name != "entropy"}
        lines["decayed checkpoints"] = interpolate(ends[last - 1][1], ends[last][1], ALPHAS, loss_fn)
        lines["models of two seeds"] = interpolate(stranger, ends[last][1], ALPHAS, loss_fn)
        directions = _directions(
            learner, ends[last - 1][1], seen[last, _marks(plan, last)[2]][1], befores[last][1], ends[last][1], cell.seed
        )
    if cell.arm.settings["protocol"] == "wsd":
        lines["plateau iterates"] = interpolate(seen[last, _marks(plan, last)[2]][1], befores[last][1], ALPHAS, loss_fn)
    recipe = learner.recipe
    tokens = plan.cost * recipe.batch.sequences * recipe.data.sequence_length()
    curve = {step: float(look[0].mean()) for (j, step), look in seen.items() if j == last}
    extra = {
        "peak": peak, "cost": plan.cost, "split": _split_data(split),
        "befores": [float(losses.mean()) for losses, _ in befores], "directions": directions,
        "lines": {name: [list(line.alphas), list(line.losses)] for name, line in lines.items()},
    }  # fmt: skip
    return Measurement(
        metrics=text_metrics([losses for losses, _ in ends], split, lines, directions),
        series={"validation loss": _series(plan.runs[last], peak, curve)},
        extra=extra,
        tokens=tokens,
        flops=tokens * counts_of(recipe).training_flops_per_token,
    )


def text_metrics(
    ends: Sequence[Tensor],
    split: EntropySplit,
    lines: Mapping[str, LossLine],
    directions: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """The metrics of a text cell: losses of all targets at each budget, and what else its protocol was looked at for."""
    metrics = {f"loss_{j}": float(losses.mean()) for j, losses in enumerate(ends, start=1)}
    metrics["decile_gap"] = decile_gap(split)
    if river := lines.get("decayed checkpoints"):
        metrics |= {"bulge": river.bulge, "climb": river.climb}
    if slopes := lines.get("plateau iterates"):
        metrics["valley"] = slopes.midpoint
    if directions:
        metrics["steepness"] = directions["decay"][1] - directions["plateau"][1]
    return metrics


def _directions(
    learner: TextLearner, earlier: State, begun: State, plateau: State, decayed: State, seed: int
) -> dict[str, list[float]]:
    """What `seen_along` says of the first held-out sequences, at the weights where the decay begins.

    Args:
        earlier: the decayed checkpoint before. begun: as many steps before the plateau's end as the decay lasts.
        plateau: where the decay begins. decayed: where it ends.
    """
    learner.model.load_state_dict(dict(plateau))
    tokens_bt = next(iter(learner.data.evaluation(CURVED, CURVED))).tokens_bt.to(learner.device)
    loss, parameters = token_loss(open_subject(learner.model), tokens_bt), parameters_of(learner.model)
    moves = {
        "progress": difference(decayed, earlier),
        "plateau": difference(plateau, begun),
        "decay": difference(decayed, plateau),
    }
    return seen_along(loss, parameters, moves, seed)


def seen_along(loss: TensorLoss, parameters: State, moves: Mapping[str, State], seed: int) -> dict[str, list[float]]:
    """Move, and a random one like the decay → length, curvature at the parameters, cosine with the progress."""
    found: dict[str, State] = {name: {key: move[key] for key in parameters} for name, move in moves.items()}
    found["random"] = random_like(found["decay"], seed)
    return {
        name: [norm(move), curvature(loss, parameters, move), cosine(move, found["progress"])]
        for name, move in found.items()
    }
