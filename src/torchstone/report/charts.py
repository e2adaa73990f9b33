"""Line charts as data: the seeds of every curve brought together, and the study's own figures, ready for the
browser.

A chart is drawn by `assets/report.js` from `Chart.payload()`; the legend, the caption and the table of end
values are made from the same object, so that picture and text cannot disagree.

Sizes: a cell's curve keeps at most `Detail.points` points; single seeds are embedded only while there are at
most `MANY_CELLS` cells, after that only the mean and the range over seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchstone.report import words
from torchstone.report.result import Figure, Line, Result, Series
from torchstone.report.sampling import common_axes, largest_triangles, mean_and_range, on_one_grid

MANY_CELLS = 24
STEEP_POINTS = 10
MOST_CURVES = 60
BYTES_PER_NUMBER = 7
AXIS_LABELS = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds", "steps": "steps"}


@dataclass(frozen=True)
class Detail:
    """How much of the curves is embedded; `page` lowers it until the file is small enough."""

    points: int
    seeds: bool


@dataclass(frozen=True)
class ChartLine:
    """One legend entry: a line, its band and the single seeds behind it. Values are None where there is
    nothing."""

    name: str
    color: int
    x: dict[str, list[float | None]]
    y: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None
    members: list[list[float | None]] = field(default_factory=list)
    seeds: int = 0

    @property
    def last(self) -> float | None:
        """The last value of the line."""
        return next((value for value in reversed(self.y) if value is not None), None)


@dataclass(frozen=True)
class Chart:
    """One chart. `axes` are the x axes that a reader can choose from, the first is shown."""

    title: str
    y_label: str
    axes: list[tuple[str, str]]
    lines: list[ChartLine]
    log_x: bool = False
    log_y: bool = False
    note: str = ""

    @property
    def steep(self) -> bool:
        """Whether the first tenth of the points would flatten all the rest; the browser then leaves it out of
        sight."""
        columns = [c for line in self.lines for c in (line.y, line.low, line.high) if c and len(c) >= STEEP_POINTS]
        if not columns or self.log_y:
            return False
        every = [value for column in columns for value in column if value is not None]
        later = [value for column in columns for value in column[len(column) // 10 :] if value is not None]
        return bool(later) and max(every) - min(every) > 2.5 * (max(later) - min(later))

    def payload(self) -> dict[str, Any]:
        """The chart as JSON-able data."""
        return {
            "y": self.y_label,
            "axes": [{"key": key, "label": label} for key, label in self.axes],
            "logX": self.log_x,
            "logY": self.log_y,
            "steep": self.steep,
            "lines": [
                {
                    "name": line.name,
                    "color": line.color,
                    "x": line.x,
                    "y": line.y,
                    "low": line.low,
                    "high": line.high,
                    "members": line.members,
                }
                for line in self.lines
            ],
        }


def arm_colors(result: Result) -> dict[str, int]:
    """Colour number of every arm: 0 (grey) is the baseline, the others count from 1 in the order of the
    arms."""
    others = [arm.name for arm in result.arms if arm.name != result.baseline]
    return {result.baseline: 0, **{name: index + 1 for index, name in enumerate(others)}}


def estimated_bytes(result: Result, detail: Detail) -> int:
    """About how large the curves are as JSON: each line has axes, mean, low, high and single seeds."""
    numbers_of: dict[tuple[str, str], int] = {}
    for cell in result.cells:
        for name, series in cell.series.items():
            points = min(detail.points, len(series.values))
            shared = (len(series.axes) + 3) * points
            before = numbers_of.get((cell.arm, name), shared)
            numbers_of[cell.arm, name] = max(before, shared) + (points if detail.seeds else 0)
    return BYTES_PER_NUMBER * sum(numbers_of.values())


def curve_names(result: Result) -> list[str]:
    """Names of all curves; those of judged metrics come first, and the first `MOST_CURVES` are drawn."""
    judged = {verdict.metric for verdict in result.verdicts}
    names = list(dict.fromkeys(name for cell in result.cells for name in cell.series))
    return sorted(names, key=lambda name: _metric_name(name) not in judged)


def curves(result: Result, detail: Detail) -> list[Chart]:
    """One chart per curve name: arms are lines, seeds a band."""
    cells = [cell for cell in result.cells if cell.series]
    charts = []
    for name in curve_names(result)[:MOST_CURVES]:
        lines = []
        for arm, color in arm_colors(result).items():
            seeds = [cell.series[name] for cell in cells if cell.arm == arm and name in cell.series]
            seeds = [one for one in seeds if one.values and common_axes([one])]
            if seeds and common_axes(seeds):
                lines.append(_line(arm, color, seeds, detail))
        if not lines:
            continue
        axes = [axis for axis in lines[0].x if all(axis in line.x for line in lines)]
        if axes:
            charts.append(_curve_chart(name, axes, lines, result))
    return charts


def _metric_name(curve: str) -> str:
    """The name of the metric that this curve ends in: `validation_loss` for `validation loss`."""
    return curve.replace(" ", "_")


def _curve_chart(name: str, axes: list[str], lines: list[ChartLine], result: Result) -> Chart:
    metric = next((metric for metric in result.metrics if metric.name == _metric_name(name)), None)
    label = words.metric_label(_metric_name(name), result.metrics) if metric else name.replace("_", " ")
    unit = f" ({metric.unit})" if metric and metric.unit else ""
    labelled = [(axis, AXIS_LABELS.get(axis, axis)) for axis in axes]
    return Chart(label[:1].upper() + label[1:], label + unit, labelled, lines)


def _line(arm: str, color: int, seeds: Sequence[Series], detail: Detail) -> ChartLine:
    aligned = on_one_grid(seeds)
    mean_p, low_p, high_p = mean_and_range(aligned.values_sp)
    key_p = next(iter(aligned.axes.values()))
    kept = largest_triangles(key_p, mean_p, detail.points)
    several = len(seeds) > 1
    return ChartLine(
        name=arm,
        color=color,
        x={axis: _plain(values[kept], 7) for axis, values in aligned.axes.items()},
        y=_plain(mean_p[kept]),
        low=_plain(low_p[kept]) if several else None,
        high=_plain(high_p[kept]) if several else None,
        members=[_plain(seed[kept]) for seed in aligned.values_sp] if several and detail.seeds else [],
        seeds=len(seeds),
    )


def figures(result: Result, detail: Detail) -> list[Chart]:
    """The study's own figures as charts; a line named like an arm has the arm's colour."""
    return figure_charts(result.figures, arm_colors(result), detail)


def figure_charts(figures: Iterable[Figure], colors: dict[str, int], detail: Detail) -> list[Chart]:
    """Figures as charts; `colors` says which names have a colour already."""
    return [_figure(figure, colors, detail) for figure in figures]


def _figure(figure: Figure, colors: dict[str, int], detail: Detail) -> Chart:
    taken = {colors[line.name] for line in figure.lines if line.name in colors}
    free = iter([index for index in range(1, len(figure.lines) + len(taken) + 2) if index not in taken])
    lines = []
    for line in figure.lines:
        color = colors[line.name] if line.name in colors else next(free)
        lines.append(_figure_line(line, color, figure, detail))
    return Chart(
        figure.title,
        figure.y_label,
        [("x", figure.x_label)],
        lines,
        figure.log_x,
        figure.log_y,
        note=figure.note,
    )


def _figure_line(line: Line, color: int, figure: Figure, detail: Detail) -> ChartLine:
    """Points in order of x. Of points with the same x the first stays; a log axis leaves out what is not
    positive."""
    x = np.asarray(line.x, dtype=float)
    columns = [_column(values, len(x)) for values in (line.y, line.low, line.high)]
    x, order = np.unique(x, return_index=True)
    columns = [column[order] for column in columns]
    if figure.log_x:
        columns, x = [column[x > 0] for column in columns], x[x > 0]
    if figure.log_y:
        columns = [np.where(column > 0, column, np.nan) for column in columns]
    kept = largest_triangles(x, columns[0], detail.points) if len(x) else np.arange(0)
    y, low, high = (_plain(column[kept]) for column in columns)
    banded = line.low is not None and line.high is not None
    return ChartLine(line.name, color, {"x": _plain(x[kept], 7)}, y, low if banded else None, high if banded else None)


def _column(values: Iterable[float | None] | None, count: int) -> np.ndarray:
    known = [np.nan if value is None else value for value in values or ()][:count]
    return np.array(known + [np.nan] * (count - len(known)), dtype=float)


def _plain(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Numbers with few digits, as short in JSON as they can be; nan becomes None."""
    out: list[float | None] = []
    for value in values.tolist():
        if value != value:
            out.append(None)
            continue
        short = float(f"{value:.{digits}g}")
        out.append(int(short) if short.is_integer() and abs(short) < 1e15 else short)
    return out
