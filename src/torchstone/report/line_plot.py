"""A line chart as a still SVG picture, for files that stand alone; the pages draw theirs in the browser."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from torchstone.report import numbers
from torchstone.report.charts import Chart, ChartLine
from torchstone.report.markup import Child, Markup, element

PALETTE = ("#5b626d", "#0072b2", "#d55e00", "#00855f", "#b4558a", "#b87a00", "#2f93cf", "#7a5cc7")
INK, GRID = "#5d6470", "#d8d5cd"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 190, 34, 52
TICKS, MOST_NAMES = 6, 18


class _Axis:
    """From values to pixels, linear or logarithmic."""

    def __init__(self, values: list[float], log: bool, begin: float, end: float) -> None:
        self.log = log and bool(values) and min(values) > 0
        low, high = numbers.bounds([self._place(value) for value in values] or [0.0, 1.0])
        self.low, self.high, self.begin, self.end = low, high, begin, end

    def _place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def pixel(self, value: float) -> float:
        share = (self._place(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.log:
            every = [
                digit * 10.0**power
                for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                for digit in (1, 2, 5)
            ]
            inside = [value for value in every if self.low - 1e-9 <= math.log10(value) <= self.high + 1e-9]
            if len(inside) >= 2:
                return inside[:: max(1, len(inside) // TICKS)]
            return [10**self.low, 10**self.high]
        step = _round_step((self.high - self.low) / TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return size * next(factor for factor in (1, 2, 5, 10) if rough <= factor * size * (1 + 1e-9))


def svg(chart: Chart) -> Markup:
    """The chart on its first axis as one `svg` element."""
    key, label = chart.axes[0]
    x = _Axis(_known(line.x[key] for line in chart.lines), chart.log_x, LEFT, WIDTH - RIGHT)
    columns = [column for line in chart.lines for column in (line.y, line.low, line.high) if column is not None]
    y = _Axis(_known(columns), chart.log_y, HEIGHT - BOTTOM, TOP)
    return element(
        "svg",
        element("rect", width=WIDTH, height=HEIGHT, fill="#ffffff"),
        _text(chart.title, LEFT, 20, "start", "#1c2026"),
        _grid(x, y),
        [_band(line, key, x, y) for line in chart.lines],
        [_line(line, key, x, y) for line in chart.lines],
        _names(chart),
        _text(label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "middle"),
        element("text", chart.y_label, x=16, y=HEIGHT // 2, fill=INK, text_anchor="middle",
                transform=f"rotate(-90 16 {HEIGHT // 2})"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{chart.title}: {chart.y_label} against {label}",
        font_family="system-ui, sans-serif",
        font_size=12,
    )  # fmt: skip


def _known(columns: object) -> list[float]:
    return [value for column in columns for value in column if value is not None]  # type: ignore[attr-defined]


def _grid(x: _Axis, y: _Axis) -> list[Child]:
    found: list[Child] = []
    for value, label in _labelled(x.ticks()):
        at = f"{x.pixel(value):.1f}"
        found.append(element("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, stroke=GRID))
        found.append(_text(label, x.pixel(value), HEIGHT - BOTTOM + 17, "middle"))
    for value, label in _labelled(y.ticks()):
        at = f"{y.pixel(value):.1f}"
        found.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, stroke=GRID))
        found.append(_text(label, LEFT - 7, y.pixel(value) + 4, "end"))
    return found


def _labelled(values: list[float]) -> list[tuple[float, str]]:
    """Ticks with their labels: as many digits as tell neighbours apart, at least four."""
    steps = [abs(after - before) for before, after in zip(values, values[1:], strict=False) if after != before]
    digits = 4
    if steps:
        most, least = max(map(abs, values)), min(steps)
        digits = max(4, math.floor(math.log10(most) + 1e-9) - math.floor(math.log10(least) + 1e-9) + 1)
    return [(value, f"{value:.{digits}g}") for value in values]


def _points(xs: list[float | None], ys: list[float | None], x: _Axis, y: _Axis) -> NDArray[np.float64]:
    known = [(a, b) for a, b in zip(xs, ys, strict=True) if a is not None and b is not None]
    return np.array([(x.pixel(a), y.pixel(b)) for a, b in known]).reshape(-1, 2)


def _path(points: NDArray[np.float64]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _line(line: ChartLine, key: str, x: _Axis, y: _Axis) -> list[Child]:
    points, stroke = _points(line.x[key], line.y, x, y), PALETTE[line.color % len(PALETTE)]
    dashes = "2 4" if line.color >= len(PALETTE) else None
    found: list[Child] = [
        element("polyline", points=_path(points), fill="none", stroke=stroke, stroke_width=2, stroke_dasharray=dashes)
    ]
    if len(points) <= 20:
        found += [element("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=3, fill=stroke) for a, b in points]
    return found


def _band(line: ChartLine, key: str, x: _Axis, y: _Axis) -> Markup | None:
    if line.low is None or line.high is None:
        return None
    low, high = _points(line.x[key], line.low, x, y), _points(line.x[key], line.high, x, y)
    fill = PALETTE[line.color % len(PALETTE)]
    return element("polygon", points=_path(np.concatenate([low, high[::-1]])), fill=fill, fill_opacity="0.15")


def _names(chart: Chart) -> list[Child]:
    found: list[Child] = []
    for index, line in enumerate(chart.lines[:MOST_NAMES]):
        at, stroke = TOP + 8 + index * 18, PALETTE[line.color % len(PALETTE)]
        found.append(
            element("line", x1=WIDTH - RIGHT + 14, x2=WIDTH - RIGHT + 34, y1=at, y2=at, stroke=stroke, stroke_width=3)
        )
        name = line.name if len(line.name) <= 22 else f"{line.name[:21]}…"
        found.append(_text(name, WIDTH - RIGHT + 40, at + 4, "start"))
    return found


def _text(text: str, x: float, y: float, anchor: str, fill: str = INK) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", fill=fill, text_anchor=anchor)
