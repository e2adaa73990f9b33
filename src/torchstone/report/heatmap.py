"""Heat maps as SVG: coloured cells with labels, a colour scale, and the value of every cell on hover.

Colours are attributes of the shapes, so that the picture needs no style sheet: it stands in a page whose content security
policy forbids inline styles, and alone as a file. Both scales are readable in light and dark surroundings and for people
who do not see red and green apart: dark blue to yellow for amounts, blue over near-white to orange around 0.

Labels never touch: of the columns' as many are shown as have room, turned where one is longer than its place. Widths are
estimated, since the font is the reader's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchstone.report import numbers
from torchstone.report.finding import Heatmap
from torchstone.report.markup import Child, Markup, element

AMOUNTS = ((37, 29, 86), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
SIGNED = ((0, 84, 143), (107, 174, 214), (244, 242, 236), (244, 155, 92), (166, 54, 3))
NOTHING = "#8888882e"
INK = "#7d8590"
WIDTH, MOST_HEIGHT, LEFT, TOP, SCALE = 760, 520, 74, 8, 86
LARGEST_CELL, SMALLEST_CELL = 26.0, 3.0
MOST_LABELS, MOST_TITLES, SCALE_STEPS = 26, 4000, 24
LETTER, LINE, SHORT = 6.6, 15.0, 48.0  # pixels: width of a letter, of a turned label, of one that need not be turned
LONGEST = 30  # letters of a label; the whole one is in the words on hover
ANGLE = 65  # degrees of a turned label


def svg(heatmap: Heatmap) -> Markup:
    """The heat map as one `svg` element."""
    rows, columns = len(heatmap.y), len(heatmap.x)
    left = _left(heatmap)
    across = min(LARGEST_CELL * 2, (WIDTH - left - SCALE) / max(1, columns))
    down = max(SMALLEST_CELL, min(LARGEST_CELL, MOST_HEIGHT / max(1, rows)))
    low, high = value_range(heatmap)
    cells = [
        _cell(heatmap, row, column, (left + column * across, TOP + row * down), (across, down), (low, high))
        for row in range(rows)
        for column in range(columns)
    ]
    bottom = TOP + rows * down
    depth = _depth(heatmap)
    return element(
        "svg",
        cells,
        _row_labels(heatmap, left, down, bottom),
        _column_labels(heatmap, left, across, bottom),
        _text(
            heatmap.x_label,
            max(left + across * columns / 2, _pixels(heatmap.x_label) / 2),
            bottom + depth + 19,
            "middle",
        ),
        _scale(heatmap, low, high, left + columns * across + 22, min(bottom - TOP, 200.0) if rows > 4 else 100.0),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {max(bottom + depth + 31, TOP + 166):.0f}",
        role="img",
        aria_label=f"{heatmap.title}: {heatmap.y_label} by {heatmap.x_label}, from {low:.4g} to {high:.4g}.",
        class_="heatmap",
        font_family="system-ui, sans-serif",
        font_size=11,
    )


def value_range(heatmap: Heatmap) -> tuple[float, float]:
    """The values that the ends of the colour scale stand for; mirrored around 0 where the colours are."""
    known = [value for row in heatmap.values for value in row if value is not None]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    if heatmap.diverging:
        most = max(abs(low), abs(high)) or 1.0
        return -most, most
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def color(share: float, diverging: bool) -> str:
    """`#rrggbb` at a share of the scale, 0 to 1."""
    stops = np.asarray(SIGNED if diverging else AMOUNTS, dtype=float)
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    mixed = stops[first] + (place - first) * (stops[first + 1] - stops[first])
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def _cell(
    heatmap: Heatmap,
    row: int,
    column: int,
    at: tuple[float, float],
    size: tuple[float, float],
    ends: tuple[float, float],
) -> Markup:
    value = heatmap.values[row][column]
    fill = NOTHING if value is None else color((value - ends[0]) / (ends[1] - ends[0]), heatmap.diverging)
    title = None
    if len(heatmap.x) * len(heatmap.y) <= MOST_TITLES:
        where = f"{heatmap.y_label} {_name(heatmap.y[row])}, {heatmap.x_label} {_name(heatmap.x[column])}"
        title = element("title", f"{where}: {numbers.typeset(numbers.reading(value))} {heatmap.unit}".rstrip())
    gap = 0.6 if min(size) > 6 else 0.0
    box = {"x": at[0], "y": at[1], "width": size[0] - gap, "height": size[1] - gap}
    return element("rect", title, fill=fill, **{name: f"{number:.2f}" for name, number in box.items()})


def _row_labels(heatmap: Heatmap, left: float, down: float, bottom: float) -> list[Child]:
    found: list[Child] = []
    for row in _some(len(heatmap.y), MOST_LABELS):
        found.append(_text(_short(heatmap.y[row]), left - 6, TOP + (row + 0.5) * down + 3.5, "end"))
    height = TOP + (bottom - TOP) / 2
    turned = f"rotate(-90 14 {height:.1f})"
    found.append(
        element("text", heatmap.y_label, x=14, y=f"{height:.1f}", fill=INK, text_anchor="middle", transform=turned)
    )
    return found


def _column_labels(heatmap: Heatmap, left: float, across: float, bottom: float) -> list[Child]:
    widest = _widest(heatmap.x)
    place = LINE if widest > SHORT else widest + 0.5 * LETTER
    found: list[Child] = []
    for column in _some(len(heatmap.x), across * len(heatmap.x) / place):
        x, text = left + (column + 0.5) * across, _short(heatmap.x[column])
        if widest > SHORT:
            x, y = x + 4, bottom + 11
            turned = f"rotate(-{ANGLE} {x:.1f} {y:.1f})"
            found.append(
                element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", fill=INK, text_anchor="end", transform=turned)
            )
        else:
            found.append(_text(text, x, bottom + 15, "middle"))
    return found


def _widest(labels: Sequence[str | float]) -> float:
    """Pixels of the longest label."""
    return max((_pixels(_short(label)) for label in labels), default=0.0)


def _pixels(text: str) -> float:
    return LETTER * len(text)


def _left(heatmap: Heatmap) -> float:
    """Where the cells begin: right of the rows' labels, and far enough for the first turned one of the columns."""
    widest = _widest(heatmap.x)
    turned = widest * math.cos(math.radians(ANGLE)) if widest > SHORT else 0.0
    return max(LEFT, 28 + _widest(heatmap.y), turned)


def _depth(heatmap: Heatmap) -> float:
    """Height of the columns' labels."""
    widest = _widest(heatmap.x)
    return widest * math.sin(math.radians(ANGLE)) + 12 if widest > SHORT else 15.0


def _scale(heatmap: Heatmap, low: float, high: float, x: float, height: float) -> list[Child]:
    """The colour scale with its ends and middle."""
    step = height / SCALE_STEPS
    found: list[Child] = []
    for index in range(SCALE_STEPS):
        share = 1 - (index + 0.5) / SCALE_STEPS
        box = {"x": x, "y": TOP + index * step, "width": 11, "height": step + 0.3}
        shape = {name: f"{number:.2f}" for name, number in box.items()}
        found.append(element("rect", fill=color(share, heatmap.diverging), **shape))
    for share in (0.0, 0.5, 1.0):
        text = numbers.typeset(f"{low + share * (high - low):.3g}")
        found.append(_text(text, x + 16, TOP + (1 - share) * (height - 8) + 8, "start"))
    if heatmap.unit:
        found.append(_text(heatmap.unit, x, TOP + height + 16, "start"))
    return found


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", fill=INK, text_anchor=anchor)


def _name(label: str | float) -> str:
    return label if isinstance(label, str) else f"{label:.4g}"


def _short(label: str | float) -> str:
    name = _name(label)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _some(count: int, within: float) -> range:
    """Indices of at most `within` labels, evenly spread."""
    return range(0, count, max(1, -(-count // max(1, int(min(within, MOST_LABELS))))))
