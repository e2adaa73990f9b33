"""Runs of one cell of the warmup study, its metrics, tables and figures, and published numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchstone.diagnose.updates.series import EARLY, LATE, Record, curve, early_late, read_updates
from torchstone.diagnose.updates.watch import UpdateWatch
from torchstone.errors import NonFiniteError, StudyError
from torchstone.lab.study import Cell, Measurement
from torchstone.lab.training import thinned
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table
from torchstone.studies._warmup_free_signal import FreshHalves
from torchstone.train.loop import Callback
from torchstone.train.precision import Compute
from torchstone.train.run import RunSummary, train

Cells = Sequence[tuple[Cell, Measurement]]
NONE, WARM, LONG = "none", "warm", "long"
KINDS = (NONE, WARM, LONG)
SIDES = {NONE: (NONE,), WARM: (WARM, LONG)}
LONGER = 4  # times the warmup of `warm`
SIZES = ("l2", "angle", "rrc")
LABELS = {
    "l2": "l2 norm of updates",
    "angle": "angle of updates (rad)",
    "rrc": "relative representation change",
}
METRICS = (
    Metric(name="warmup_gap", label="warmup gap: best loss without minus best with", unit="nats/token", better="lower"),
    Metric(name="loss_none", label="best validation loss without warmup", unit="nats/token"),
    Metric(name="loss_warm", label="best validation loss with warmup", unit="nats/token"),
    Metric(name="peak_inside", label="1 if the best peaks, without and with warmup, are inside the sweep", better="higher"),
    *(
        Metric(name=f"{size}_ratio", label=f"{size} of updates, early over late, no warmup", better="neither")
        for size in SIZES
    ),
    Metric(name="l2_deviation", label="|early/late - 1| of the l2 norm, no warmup"),
    Metric(name="angle_deviation", label="|early/late - 1| of the angle, no warmup"),
    Metric(name="angle_worst", label="|early/late - 1| of the angle, worst matrix of a block, no warmup", better="neither"),
    *(
        Metric(name=f"signal_{when}", label=f"signal-to-noise ratio of a batch's gradient, {what}, no warmup", better="neither")
        for when, what in (("early", "early"), ("late", "late"), ("drop", "early minus late"))
    ),
)  # fmt: skip
PAPER = (
    PaperFigure(setting="GPT-2 124M, 2.5B tokens, AdamW: no warmup against 5 %", paper="warmup better at every tuned peak, most "
                "at high peaks (plots only)", ours="not run"),
    PaperFigure(setting="the same, LionA (l2 norm fixed)", paper="still gains from warmup", ours="not run"),
    PaperFigure(setting="the same, LionAR (angle fixed)", paper="gains much less", ours="not run"),
    PaperFigure(setting="the same, LionAR with β = 0.98, Nesterov's momentum, inverse bias correction",
                paper="best without warmup", ours="not run"),
)  # fmt: skip
NOTES = (
    f"Early is the median over steps 1 to {EARLY}, late over {LATE[0]:.0%} to {LATE[1]:.0%} of the steps; the rate is at its "
    "peak in both, because there is no warmup in these runs and the cooldown takes the last fifth.",
    "Sizes of updates are of the matrices inside blocks; the token embedding, which LionAR does not turn, is left out.",
    "Each arm has its own sweep of peaks. The best loss is the lowest over the runs of that seed: without warmup over the peaks, "
    "with warmup over the peaks and, for AdamW and LionAR+, over two lengths. Choosing among noisy losses makes the best too "
    "low, among twice as many a little more: for those two arms alike, so that it cancels in their contrast, and each gap is a "
    "little too high.",
    "The signal-to-noise ratio is that of two halves of fresh batches, after updates 1, 3 and 5 and at 50, 65 and 80 % of all.",
    "All arms have the gains that LionAR needs, except lionar-frozen.",
)


def sweep(cell: Cell) -> list[tuple[str, float]]:
    """(length of warmup, factor of the centre peak) of every run of a cell, the measured ones first."""
    settings = cell.settings
    factors = settings["peaks"].get(cell.arm.name, settings["factors"])
    kinds = KINDS if cell.arm.name in settings["longer"] else (NONE, WARM)
    return sorted(
        ((kind, factor) for factor in factors for kind in kinds), key=lambda run: (run[1] != 1, run[0] == LONG)
    )


def recipe_of(recipe: Recipe, kind: str, factor: float) -> Recipe:
    """An arm's recipe at one of its peaks, with the warmup that `kind` asks for."""
    peak = recipe.optimizer.learning_rate * factor
    warmup = recipe.schedule.warmup * {NONE: 0, WARM: 1, LONG: LONGER}[kind]
    return load_recipe(recipe, [f"optimizer.learning_rate={peak!r}", f"schedule.warmup={warmup!r}"])


def measure(cell: Cell, recipe: Recipe) -> Measurement:
    """All runs of a cell: the best losses, and the sizes of updates at the centre peak."""
    compute, runs = Compute(**cell.prepared["compute"]), sweep(cell)
    losses: dict[str, dict[str, float | None]] = {}
    measured: dict[str, list[Record]] = {}
    series: dict[str, Series] = {}
    halves = FreshHalves(cell.settings["steps"], cell.settings["halves"])
    signal: dict[str, float] = {}
    tokens, flops, peak_bytes = 0, 0.0, 0
    for done, (kind, factor) in enumerate(runs):
        made = recipe_of(recipe, kind, factor)
        directory = cell.directory / f"{kind}-{factor:g}"
        watch: list[Callback] = []
        if factor == 1 and kind != LONG:
            watch = [UpdateWatch(cell.settings["every"], SIZES), *([halves] if kind == NONE else [])]

        def report(state: Mapping[str, Any], done: int = done) -> None:
            steps = state["steps"]
            cell.report({**state, "step": done * steps + state["step"], "steps": len(runs) * steps})

        try:
            summary = train(made, directory, compute=compute, callbacks=watch, progress=report)
        except NonFiniteError:
            losses.setdefault(kind, {})[f"{factor:g}"] = None
            continue
        losses.setdefault(kind, {})[f"{factor:g}"] = summary.final["validation_loss"]
        tokens, flops, peak_bytes = (
            tokens + summary.tokens,
            flops + summary.flops,
            max(peak_bytes, summary.peak_bytes),
        )
        if watch:
            measured[kind] = [inside(record) for record in read_updates(directory, summary.steps)]
            series[f"train loss, {kind}"] = loss_curve(summary)
            signal |= halves.metrics() if kind == NONE else {}
    extra = {
        "losses": losses,
        "centre": recipe.optimizer.learning_rate,
        "batch": recipe.batch.sequences,
        "curves": {kind: curves_of(records) for kind, records in measured.items()},
    }
    metrics = {
        **gap(losses, cell),
        "peak_inside": float(inside_sweep(losses)),
        **ratios(measured.get(NONE, [])),
        **signal,
    }
    return Measurement(metrics, series=series, extra=extra, tokens=tokens, flops=flops, peak_bytes=peak_bytes)


def gap(losses: Mapping[str, Mapping[str, float | None]], cell: Cell) -> dict[str, float]:
    """The lowest losses with and without warmup, and their difference; raises StudyError if every run of a kind diverged."""
    best = {}
    for side, kinds in SIDES.items():
        finite = [loss for kind in kinds for loss in losses.get(kind, {}).values() if loss is not None]
        if not finite:
            raise StudyError(
                f"every run of {cell.arm.name} ({side}) diverged at seed {cell.seed}; lower its centre peak."
            )
        best[f"loss_{side}"] = min(finite)
    return best | {"warmup_gap": best["loss_none"] - best["loss_warm"]}


def inside_sweep(losses: Mapping[str, Mapping[str, float | None]]) -> bool:
    """Whether the best peaks, without warmup and with the better warmup, have a lower and a higher peak beside them.

    A neighbour at which the run diverged counts: that peak is worse.
    """
    for kinds in SIDES.values():
        runs = [
            (loss, kind, float(factor))
            for kind in kinds
            for factor, loss in losses.get(kind, {}).items()
            if loss is not None
        ]
        if not runs:
            return False
        _, kind, best = min(runs)
        swept = [float(factor) for factor in losses[kind]]
        if not min(swept) < best < max(swept):
            return False
    return True


def inside(record: Record) -> dict[str, Any]:
    """A record whose numbers are those of the matrices inside blocks."""
    matrices = {name: found for name, found in record["matrices"].items() if name.startswith("blocks.")}
    together = {"l2": math.sqrt(sum(found["l2"] ** 2 for found in matrices.values()))}
    for size in ("angle", "rrc"):
        values = [found[size] for found in matrices.values() if size in found]
        together[size] = sum(values) / len(values)
    return {"step": record["step"], "rate": record["rate"], **together, "matrices": matrices}


def ratios(records: Sequence[Record]) -> dict[str, float]:
    """Early over late of every measure, and how far two of them are from 1; empty without records."""
    found: dict[str, float] = {}
    last = records[-1]["step"] if records else 0
    for size in SIZES:
        both = early_late(*curve(records, size), last)
        if both is not None and both.ratio is not None:
            found[f"{size}_ratio"] = both.ratio
    deviations = {
        f"{size}_deviation": abs(found[f"{size}_ratio"] - 1) for size in ("l2", "angle") if f"{size}_ratio" in found
    }
    return found | deviations | worst(records)


def worst(records: Sequence[Record]) -> dict[str, float]:
    """How far the angle ratio of the worst matrix is from 1; empty without records."""
    found = []
    for name in records[0]["matrices"] if records else ():
        both = early_late(*curve(records, "angle", name), records[-1]["step"])
        if both is not None and both.ratio is not None:
            found.append(abs(both.ratio - 1))
    return {"angle_worst": max(found)} if found else {}


def loss_curve(summary: RunSummary) -> Series:
    """Training loss by step, thinned."""
    record = summary.history["train"]
    kept = thinned(len(record["loss"]))
    return Series(
        axes={"steps": tuple(record["steps"][i] for i in kept)}, values=tuple(record["loss"][i] for i in kept)
    )


def curves_of(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """The curves of the figures as plain data."""
    found = {}
    for size in LABELS:
        steps, values = curve(records, size)
        found[size] = {"steps": [float(step) for step in steps], "values": values}
    return found


def by_arm(cells: Cells) -> dict[str, list[Measurement]]:
    """Arm → measurements of its seeds."""
    found: dict[str, list[Measurement]] = {}
    for cell, measurement in cells:
        found.setdefault(cell.arm.name, []).append(measurement)
    return found


def mean(values: Sequence[float]) -> float | None:
    """The mean with five digits; None of nothing."""
    return float(f"{sum(values) / len(values):.5g}") if values else None


def gap_table(cells: Cells) -> Table:
    """Best losses of every arm, its gap, and how often a best peak was at an end of the sweep."""
    rows = []
    for arm, found in by_arm(cells).items():
        swept = [one.extra["losses"] for one in found]
        lowest = [mean([low for losses in swept if (low := least(losses.get(kind, {}))) is not None]) for kind in KINDS]
        diverged = sum(loss is None for losses in swept for by_factor in losses.values() for loss in by_factor.values())
        ends = sum(not one.metrics["peak_inside"] for one in found)
        gaps = mean([one.metrics["warmup_gap"] for one in found])
        rows.append((arm, *lowest, gaps, diverged, f"{ends} of {len(found)}"))
    columns = (
        *("arm", "best without", "best with", f"best with {LONGER} times as long", "gap", "diverged runs"),
        "seeds whose best peak is an end",
    )
    note = "means over seeds, nats per token; a positive gap is what the better warmup gains"
    return Table(title="Warmup gap", columns=columns, rows=tuple(rows), note=note)


def least(by_factor: Mapping[str, float | None]) -> float | None:
    """The lowest loss of a sweep."""
    return min((loss for loss in by_factor.values() if loss is not None), default=None)


def ratio_table(cells: Cells) -> Table:
    """Early over late of every measure, without and with warmup."""
    rows = []
    for arm, found in by_arm(cells).items():
        for kind in (NONE, WARM):
            numbers: list[float | None] = []
            for size in LABELS:
                values = []
                for one in found:
                    line = one.extra["curves"].get(kind, {}).get(size)
                    both = early_late(line["steps"], line["values"]) if line else None
                    values += [both.ratio] if both is not None and both.ratio is not None else []
                numbers.append(mean(values))
            bent = [one.metrics["angle_worst"] for one in found if kind == NONE and "angle_worst" in one.metrics]
            if any(number is not None for number in numbers):
                rows.append((arm, kind, *numbers, mean(bent)))
    return Table(
        title="Early over late updates at the centre peak",
        columns=("arm", "warmup", *LABELS, "|angle ratio - 1| of the worst matrix"),
        rows=tuple(rows),
        note="means over seeds; the worst matrix decides nothing: rows whose gradient is exactly 0 late do not turn",
    )


def signal_table(cells: Cells) -> Table:
    """Signal-to-noise ratio of a batch's gradient, and the critical batch size that follows."""
    rows = []
    for arm, found in by_arm(cells).items():
        numbers = []
        for name in ("signal_early", "signal_late"):
            values = [one.metrics[name] for one in found if name in one.metrics]
            numbers += [
                mean(values),
                mean([one.extra["batch"] / value for one, value in zip(found, values, strict=False) if value]),
            ]
        if numbers[0] is not None:
            rows.append((arm, *numbers))
    return Table(
        title="Signal-to-noise ratio of the gradient, no warmup",
        columns=("arm", "early", "critical batch early", "late", "critical batch late"),
        rows=tuple(rows),
        note="from halves of fresh batches at the centre peak, means over seeds; critical batch in sequences",
    )


def tables(cells: Cells) -> tuple[Table, ...]:
    """Losses and gaps, early over late, signal."""
    return gap_table(cells), ratio_table(cells), signal_table(cells)


def figures(cells: Cells) -> tuple[Figure, ...]:
    """Every measure by step, without and with warmup; and the loss by peak."""
    arms = by_arm(cells)
    found = [measure_figure(arms, size, label) for size, label in LABELS.items()]
    return tuple(figure for figure in (*found, peak_figure(arms)) if figure.lines)


def measure_figure(arms: Mapping[str, Sequence[Measurement]], size: str, label: str) -> Figure:
    """One measure by step: mean and range over seeds."""
    lines = []
    for arm, measurements in arms.items():
        for kind in (NONE, WARM):
            runs = [one.extra["curves"][kind][size] for one in measurements if kind in one.extra["curves"]]
            steps = sorted(set.intersection(*(set(run["steps"]) for run in runs))) if runs else []
            columns = [[dict(zip(run["steps"], run["values"], strict=True))[step] for run in runs] for step in steps]
            if steps:
                lines.append(line_of(f"{arm}, {kind}", steps, columns))
    return Figure(
        title=f"{label[0].upper()}{label[1:]} by step", x_label="step", y_label=label, log_x=True, log_y=True, lines=tuple(lines),
        note="mean and range over seeds, at the centre peak",
    )  # fmt: skip


def peak_figure(arms: Mapping[str, Sequence[Measurement]]) -> Figure:
    """Validation loss by peak rate; peaks at which a run diverged are left out."""
    lines = []
    for arm, measurements in arms.items():
        for kind in (NONE, WARM):
            runs = [one.extra["losses"][kind] for one in measurements if kind in one.extra["losses"]]
            factors = [factor for factor in (runs[0] if runs else []) if all(run[factor] is not None for run in runs)]
            factors.sort(key=float)
            centre = measurements[0].extra["centre"]
            if factors:
                peaks = [centre * float(factor) for factor in factors]
                lines.append(line_of(f"{arm}, {kind}", peaks, [[run[factor] for run in runs] for factor in factors]))
    return Figure(
        title="Validation loss by peak rate", x_label="peak learning rate", y_label="nats/token", log_x=True, lines=tuple(lines),
        note="mean and range over seeds",
    )  # fmt: skip


def line_of(name: str, x: Sequence[float], columns: Sequence[Sequence[float]]) -> Line:
    """Mean and range of columns of values."""
    return Line(
        name=name,
        x=tuple(x),
        y=tuple(sum(column) / len(column) for column in columns),
        low=tuple(map(min, columns)),
        high=tuple(map(max, columns)),
    )
