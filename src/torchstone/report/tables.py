"""Tables that every report shows, as rows of text: measurements, costs, cells. HTML and Markdown print the
same ones.

All means are over cells that finished; a cost that no cell recorded is left out as a column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torchstone.report import numbers
from torchstone.report.result import ArmRecord, CellRecord, Result, Table

MOST_ROWS = 400
STATES = {"done": "done", "failed": "✗\u00a0failed", "missing": "–\u00a0missing"}


@dataclass(frozen=True)
class Grid:
    """A table of text.

    `numeric` says which columns are aligned right; a line break in a cell starts an aside, such as a ratio;
    `cut` counts rows that are not shown.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    cut: int = 0


def of_table(table: Table) -> Grid:
    """A study's table, numbers formatted, long ones cut."""
    width = len(table.columns)
    rows = [tuple(row[:width]) + (None,) * (width - len(row)) for row in table.rows]
    numeric = tuple(
        any(isinstance(row[column], int | float) for row in rows)
        and not any(isinstance(row[column], str) for row in rows)
        for column in range(width)
    )
    shown = tuple(tuple(_cell(value) for value in row) for row in rows[:MOST_ROWS])
    return Grid(table.columns, shown, numeric, cut=len(rows) - len(shown))


def _cell(value: str | float | int | None) -> str:
    return value if isinstance(value, str) else numbers.number(value)


def done(result: Result, arm: str) -> list[CellRecord]:
    """The finished cells of an arm."""
    return [cell for cell in result.cells if cell.arm == arm and cell.status == "done"]


def known(values: Iterable[float | int | None]) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def mean(values: list[float]) -> float | None:
    """Mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def mean_and_spread(values: list[float]) -> str:
    """`2.314 ± 0.012`: mean and standard deviation over cells (n - 1 in the denominator)."""
    middle = mean(values)
    if middle is None:
        return numbers.MISSING
    if len(values) < 2:
        return numbers.number(middle)
    deviation = math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
    if deviation == 0:
        return f"{numbers.number(middle)} ± 0"
    places = numbers.places_for(deviation)
    return f"{middle:,.{places}f} ± {deviation:.{places}f}"


def measurements(result: Result) -> Grid | None:
    """Arms × metrics: mean and standard deviation over finished cells."""
    metrics = [m for m in result.metrics if any(m.name in cell.metrics for cell in result.cells)]
    if not metrics:
        return None
    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    heads = [f"{m.label}{f' ({m.unit})' if m.unit else ''}{arrows[m.better]}" for m in metrics]
    rows = []
    for arm in result.arms:
        cells = done(result, arm.name)
        values = [known(cell.metrics.get(metric.name) for cell in cells) for metric in metrics]
        rows.append((arm.name, str(len(cells)), *(mean_and_spread(one) for one in values)))
    return Grid(("arm", "cells", *heads), tuple(rows), (False, *[True] * (len(metrics) + 1)))


Cost = Callable[[ArmRecord, list[CellRecord]], float | None]


def _rate(_: ArmRecord, cells: list[CellRecord]) -> float | None:
    return mean([cell.tokens / cell.seconds for cell in cells if cell.tokens and cell.seconds])


COSTS: tuple[tuple[str, Cost, Callable[[float | None], str]], ...] = (
    ("parameters", lambda arm, cells: arm.parameters, numbers.quantity),
    ("active parameters", lambda arm, cells: arm.active_parameters, numbers.quantity),
    ("FLOPs/token", lambda arm, cells: arm.flops_per_token, numbers.quantity),
    ("tokens", lambda arm, cells: mean(known(cell.tokens for cell in cells)), numbers.quantity),
    ("total FLOPs", lambda arm, cells: mean(known(cell.flops for cell in cells)), numbers.quantity),
    ("time", lambda arm, cells: mean(known(cell.seconds for cell in cells)), numbers.seconds),
    ("tokens/s", _rate, numbers.quantity),
    ("peak memory", lambda arm, cells: mean(known(cell.peak_bytes for cell in cells)), numbers.size),
)


def costs(result: Result) -> Grid | None:
    """Arms × costs, each with its ratio to the baseline's."""
    baseline = next((arm for arm in result.arms if arm.name == result.baseline), None)
    columns: list[list[str]] = []
    heads: list[str] = []
    for head, cost, show in COSTS:
        values = [cost(arm, done(result, arm.name)) for arm in result.arms]
        if all(value is None for value in values):
            continue
        base = cost(baseline, done(result, baseline.name)) if baseline else None
        heads.append(head)
        columns.append([_with_ratio(value, base, show) for value in values])
    if not columns:
        return None
    rows = tuple((arm.name, *(column[index] for column in columns)) for index, arm in enumerate(result.arms))
    return Grid(("arm", *heads), rows, (False, *[True] * len(heads)))


def _with_ratio(value: float | None, base: float | None, show: Callable[[float | None], str]) -> str:
    if value is None or not base or value == base:
        return show(value)
    return f"{show(value)}\n(×{value / base:.{3 if 0.95 < value / base < 1.05 else 2}f})"


def cells(result: Result) -> Grid:
    """Every cell, failed ones among them, in the order of arms and seeds."""
    metrics = [m for m in result.metrics if any(m.name in cell.metrics for cell in result.cells)]
    timed = any(cell.seconds is not None for cell in result.cells)
    keyed = any(cell.fingerprint for cell in result.cells)
    rows = []
    place = {arm.name: index for index, arm in enumerate(result.arms)}
    ordered = sorted(result.cells, key=lambda cell: (place.get(cell.arm, len(place)), cell.seed))
    for cell in ordered[:MOST_ROWS]:
        values = [numbers.number(cell.metrics.get(metric.name), 5) for metric in metrics]
        time = [numbers.seconds(cell.seconds)] if timed else []
        key = [cell.fingerprint[:12] or numbers.MISSING] if keyed else []
        rows.append((cell.arm, str(cell.seed), STATES[cell.status], *values, *time, *key))
    columns = ["arm", "seed", "status", *(metric.label for metric in metrics)]
    columns += (["time"] if timed else []) + (["fingerprint"] if keyed else [])
    numeric = [False, True, False, *[True] * (len(metrics) + timed), *[False] * keyed]
    return Grid(tuple(columns), tuple(rows), tuple(numeric), cut=len(result.cells) - len(rows))


def failures(result: Result) -> list[tuple[str, str]]:
    """Cells that failed or are missing: who, and the error. Cells with the same error are brought
    together."""
    together: dict[tuple[str, str], list[str]] = {}
    for cell in result.cells:
        if cell.status != "done":
            error = cell.error or ("no error was recorded" if cell.status == "failed" else "the cell was never run")
            together.setdefault((cell.status, error), []).append(f"{cell.arm}, seed {cell.seed}")
    return [(f"{status}: {'; '.join(who)}", error) for (status, error), who in together.items()]


def pairs(verdict_pairs: tuple, unit: str) -> Grid:
    """The paired units of a verdict."""
    shown = verdict_pairs[:MOST_ROWS]
    rows = tuple(
        (
            pair.unit,
            numbers.number(pair.baseline, 5),
            numbers.number(pair.arm, 5),
            numbers.number(pair.contrast, 4),
        )
        for pair in shown
    )
    head = unit[:-1] if unit.endswith("s") else unit
    columns = (head, "baseline", "arm", "contrast")
    return Grid(columns, rows, (False, True, True, True), cut=len(verdict_pairs) - len(shown))


def looks(entries: tuple[dict, ...]) -> Grid:
    """The looks of a sequential design."""
    columns = tuple(dict.fromkeys(str(key) for entry in entries for key in entry))
    rows = []
    for entry in entries:
        by_name = {str(key): value for key, value in entry.items()}
        rows.append(tuple(_look(by_name.get(column)) for column in columns))
    return Grid(tuple(column.replace("_", " ") for column in columns), tuple(rows), (True,) * len(columns))


def _look(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return numbers.MISSING if value is None else str(value)
    return numbers.number(value)
