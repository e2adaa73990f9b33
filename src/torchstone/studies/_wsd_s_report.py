"""Tables and figures of the WSD-S study, and published numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from torchstone.lab.study import Cell, Claim, Measurement, Resources
from torchstone.recipe.fingerprint import device_class
from torchstone.report.result import Figure, Line, PaperFigure, Series, Table

Cells = Sequence[tuple[Cell, Measurement]]
NOTES = (
    "Every protocol has a peak of its own, chosen at the last swept budget on seeds, tables and held-out windows that judge no "
    "cell; table.constant takes that of table.wsd.",
    "Which tokens a plateau and a decay help is shown as measured. The algebra of a softmax row, curvature f · (diag q − qqᵀ), "
    "and a digest of the paper disagree on which tokens are the steep ones; the tables by class and by decile decide.",
    "A table cell is the mean of several languages with data of their own; its losses are exact.",
    "Losses at budgets 1 and 2 are shown and not judged: peaks are the best for the last budget.",
    "Steps trained count shared beginnings once: the oracle's are more than the other protocols', wsd-free's are too.",
)
PAPER = (
    PaperFigure(setting="0.1B to 1.2B parameters, 50B, 100B and 200B tokens from one run", ours="see the tables",
                paper="WSD-S at or below WSD and cyclic cosine at every budget (plots; no table)"),
    PaperFigure(setting="resuming from the decayed checkpoint", paper="curves coincide soon after the jump (plots)",
                ours="claim text-resume"),
    PaperFigure(setting="re-warmup after a decay", paper="none is needed (documentation of the authors' training code)",
                ours="claim text-rewarmup"),
)  # fmt: skip


def resources() -> Resources:
    """One thread, or the GPUs that are visible."""
    if device_class() != "cuda":
        return Resources(threads=1)
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Resources(devices=tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count()))))


def tables(cells: Cells) -> tuple[Table, ...]:
    """Losses at each budget, the split by class and by decile, lines, and the sweep."""
    return (
        budget_table(cells),
        class_table(cells),
        decile_table(cells),
        line_table(cells),
        direction_table(cells),
        sweep_table(cells),
    )


def notes(cells: Cells, claims: Sequence[Claim]) -> tuple[str, ...]:
    """Small print, and which claims rest on a peak at an edge of the grid."""
    edge = at_edge(cells)
    touched = [claim.id for claim in claims if edge & {claim.arm, claim.baseline}]
    if not touched:
        return NOTES
    return (
        f"The chosen peak of {', '.join(sorted(edge))} lies at an edge of the grid, so that a better one may lie beyond it. This "
        f"touches the claims {', '.join(touched)}.",
        *NOTES,
    )


def at_edge(cells: Cells) -> set[str]:
    """Arms whose chosen peak is the lowest or the highest of the grid."""
    found = set()
    for cell, measurement in cells:
        swept = {row[2] for row in cell.prepared["sweep"] if row[0] == cell.arm.settings["language"]}
        if measurement.extra["peak"] in (min(swept), max(swept)):
            found.add(cell.arm.name)
    return found


def budget_table(cells: Cells) -> Table:
    """Held-out loss or exact excess of every arm at each budget."""
    rows, edge = [], at_edge(cells)
    for arm, found in by_arm(cells).items():
        kind = "excess" if arm.startswith("table.") else "loss"
        numbers = [mean(one.metrics[f"{kind}_{j}"] for one in found) for j in (1, 2, 3)]
        spread = [one.metrics[f"{kind}_3"] for one in found]
        extra = found[0].extra
        rows.append((arm, extra["peak"], extra["cost"], *numbers, max(spread) - min(spread),
                     "edge of the grid" if arm in edge else ""))  # fmt: skip
    columns = ("arm", "peak", "steps trained", "budget 1", "budget 2", "budget 3", "range at budget 3", "peak lies at")
    note = "text: held-out loss, nats per token; table: exact excess over the entropy; means over seeds"
    return Table(title="Loss at each budget", columns=columns, rows=tuple(rows), note=note)


def class_table(cells: Cells) -> Table:
    """Exact excess of certain and uncertain tokens over the plateau and the last decay."""
    rows = []
    for arm, found in by_arm(cells).items():
        if not arm.startswith("table.") or arm in ("table.cyclic", "table.oracle"):  # which have no plateau
            continue
        for part, name in ((1, "certain"), (2, "uncertain")):
            first = mean(one.extra["befores"][0][part] for one in found)
            before = mean(one.extra["befores"][-1][part] for one in found)
            rows.append((arm, name, first, before, mean(one.extra["ends"][-1][part] for one in found)))
    columns = ("arm", "tokens", "before the first decay", "before the last decay", "after it")
    return Table(title="Certain and uncertain tokens", columns=columns, rows=tuple(rows), note="exact excess, nats; means over "
                 "seeds; for constant, the first, last and last budget")  # fmt: skip


def decile_table(cells: Cells) -> Table:
    """Mean change of the loss by entropy decile over the last decay."""
    rows = []
    for arm, found in by_arm(cells).items():
        if arm.removeprefix("table.") in ("wsd", "wsd-s"):
            columns = zip(*(zip(one.extra["split"]["entropy"], one.extra["split"]["change"], strict=True) for one in found),
                          strict=True)  # fmt: skip
            for decile, pairs in enumerate(columns, start=1):
                rows.append((arm, decile, mean(pair[0] for pair in pairs), mean(pair[1] for pair in pairs)))
    note = "deciles of equal mass by reference entropy; negative: the decay lowered the loss; means over seeds"
    return Table(title="Change of the loss in the last decay", columns=("arm", "decile", "entropy", "change"), rows=tuple(rows),
                 note=note)  # fmt: skip


def line_table(cells: Cells) -> Table:
    """Losses along lines between checkpoints."""
    rows = []
    for name, found in lines_of(cells).items():
        for i, alpha in enumerate(found[0][0]):
            rows.append((name, alpha, mean(line[1][i] for line in found)))
    note = (
        "decayed checkpoints: budgets 2 and 3 of wsd-s; two seeds: the reference model and wsd-s; plateau: before the "
    )
    return Table(title="Lines between checkpoints", columns=("line", "alpha", "loss"), rows=tuple(rows),
                 note=note + "last decay of wsd, and as long before it as it lasts; means over seeds")  # fmt: skip


def direction_table(cells: Cells) -> Table:
    """Curvature along the directions of the last cycle of wsd-s on text."""
    found = [one.extra["directions"] for _, one in cells if one.extra.get("directions")]
    rows = tuple(
        (name, *(mean(one[name][i] for one in found) for i in range(3))) for name in (found[0] if found else ())
    )
    note = (
        "progress: from the decayed checkpoint of budget 2 to that of budget 3; decay: from the plateau before it; plateau: as "
        "many steps as the decay has, up to where it begins; random: as "
    )
    return Table(title="Directions", columns=("direction", "length", "curvature at the plateau", "cosine with progress"),
                 rows=rows, note=note + "long as the decay, tensor by tensor; means over seeds")  # fmt: skip


def sweep_table(cells: Cells) -> Table:
    """All losses of the sweep."""
    swept = cells[0][0].prepared["sweep"] if cells else []
    rows = []
    for language, name, peak, loss in swept:
        peers = {row[2]: row[3] for row in swept if row[:2] == [language, name]}
        best = peak == min(peers, key=peers.__getitem__)
        edge = " (edge of the grid)" if peak in (min(peers), max(peers)) else ""
        rows.append((language, name, peak, loss, f"chosen{edge}" if best else ""))
    return Table(title="Sweep of peaks", columns=("half", "protocol", "peak", "loss", ""), rows=tuple(rows),
                 note="at the last swept budget, on seeds, tables and held-out windows of its own")  # fmt: skip


def figures(cells: Cells) -> tuple[Figure, ...]:
    """Loss against steps on both halves, certain tokens against the area, change by decile, lines."""
    arms = by_arm(cells)
    text = {arm: found for arm, found in arms.items() if not arm.startswith("table.")}
    table = {arm: found for arm, found in arms.items() if arm.startswith("table.")}
    made = [
        _curves("Text: loss against steps", "steps", "held-out loss, nats", text, "validation loss", "steps"),
        _curves("Tables: excess against steps", "steps", "exact excess, nats", table, "excess", "steps", log_y=True),
        _curves("Tables: certain tokens against the area under the schedule", "sum of rates", "exact excess, nats", table,
                "certain excess", "area", log=True, log_y=True),
        _curves("Tables: uncertain tokens against the area under the schedule", "sum of rates", "exact excess, nats", table,
                "uncertain excess", "area", log=True, log_y=True),
    ]  # fmt: skip
    deciles = [_deciles(arm, found) for arm, found in arms.items() if arm.removeprefix("table.") in ("wsd", "wsd-s")]
    if deciles:
        made.append(Figure(title="Change of the loss in the last decay", x_label="entropy decile", y_label="nats per token",
                           lines=tuple(deciles), note="mean and range over seeds"))  # fmt: skip
    lines = tuple(_band(name, [(line[0], line[1]) for line in found]) for name, found in lines_of(cells).items())
    if lines:
        made.append(Figure(title="Loss along lines between checkpoints", x_label="α", y_label="held-out loss, nats", lines=lines,
                           note="mean and range over seeds"))  # fmt: skip
    return tuple(figure for figure in made if figure.lines)


def _curves(
    title: str, x: str, y: str, arms: dict[str, list[Measurement]], name: str, axis: str, *, log: bool = False,
    log_y: bool = False,
) -> Figure:  # fmt: skip
    lines = tuple(
        _band(arm, [_points(one.series[name], axis, log) for one in found])
        for arm, found in arms.items()
        if all(name in one.series for one in found)
    )
    note = "mean and range over seeds; protocols with several runs: the run of the last budget"
    return Figure(title=title, x_label=x, y_label=y, log_x=log, log_y=log_y, lines=lines, note=note)


def _points(series: Series, axis: str, log: bool) -> tuple[Sequence[float], Sequence[float]]:
    pairs = [
        (x, y) for x, y in zip(series.axes[axis], series.values, strict=True) if y is not None and (x > 0 or not log)
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _band(name: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Line:
    columns = list(zip(*(values for _, values in curves), strict=True))
    return Line(name=name, x=tuple(curves[0][0]), y=tuple(sum(column) / len(column) for column in columns),
                low=tuple(map(min, columns)), high=tuple(map(max, columns)))  # fmt: skip


def _deciles(arm: str, found: Sequence[Measurement]) -> Line:
    changes = [one.extra["split"]["change"] for one in found]
    return _band(arm, [(range(1, len(change) + 1), change) for change in changes])


def lines_of(cells: Cells) -> dict[str, list[Any]]:
    """Line → (alphas, losses) of every seed."""
    found: dict[str, list[Any]] = {}
    for _, measurement in cells:
        for name, line in measurement.extra.get("lines", {}).items():
            found.setdefault(name, []).append(line)
    return found


def by_arm(cells: Cells) -> dict[str, list[Measurement]]:
    """Arm → measurements."""
    found: dict[str, list[Measurement]] = {}
    for cell, measurement in cells:
        found.setdefault(cell.arm.name, []).append(measurement)
    return found


def mean(values: Iterable[float]) -> float:
    """The mean of some numbers."""
    listed = list(values)
    return sum(listed) / len(listed)
