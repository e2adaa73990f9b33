"""Pictures of a schedule: an SVG file that stands alone, and a few lines of text for a terminal.

Both show the rate against the step, the stages, and the checkpoints. Rates are multiples of the peak, or rates where the
schedule knows its peak. The SVG is a still picture without script or font of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, Protocol

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 74, 24, 46, 48
INK, GRID, LINE, MARK = "#5d6470", "#d8d5cd", "#0072b2", "#d55e00"
FILLS = {"warmup": "#fff1cf", "stable": "#eaf2f8", "decay": "#fde5da"}
SAMPLES, MOST_LABELS, MOST_BANDS = 700, 12, 400
HEADROOM = 1.15  # room for the checkpoints' numbers
BLOCKS = " ▁▂▃▄▅▆▇█"


class Drawable(Protocol):
    """What is drawn of a schedule."""

    @property
    def steps(self) -> int: ...
    @property
    def peak(self) -> float | None: ...
    def factor(self, step: int) -> float:
        """Factor of the peak rate at a step."""
        ...

    def stages(self) -> Sequence[Any]:
        """Stages with `name`, `begin` and `end`."""
        ...

    def checkpoints(self) -> Sequence[int]:
        """Updates after which a decayed state is there."""
        ...


def svg(schedule: Drawable, title: str = "Learning rate") -> str:
    """The picture as one `svg` element."""
    unit = 1.0 if schedule.peak is None else schedule.peak
    steps = samples(schedule)
    factors = [schedule.factor(step) for step in steps]
    top = max([*factors, 1e-12]) * HEADROOM
    points = " ".join(
        f"{_x(step, schedule):.1f},{_y(factor / top):.1f}" for step, factor in zip(steps, factors, strict=True)
    )
    label = "rate / peak" if schedule.peak is None else f"rate (peak {schedule.peak:g})"
    middle = (TOP + HEIGHT - BOTTOM) // 2
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_bands(schedule),
        *_grid(schedule, top, unit),
        f'<polyline points="{points}" fill="none" stroke="{LINE}" stroke-width="2" stroke-linejoin="round"/>',
        *_marks(schedule, top),
        _text(title, LEFT, 18, "start", "#1c2026"),
        *_legend(schedule),
        _text("step", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10),
        f'<text x="14" y="{middle}" fill="{INK}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(label)}</text>',
    ]
    name = escape(f"{title}: {label} against step", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{name}" font-family="system-ui, sans-serif" font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def samples(schedule: Drawable) -> list[int]:
    """Steps that show the whole course: evenly spaced ones, and the first and last of every stage."""
    count = min(schedule.steps, SAMPLES)
    spaced = {index * (schedule.steps - 1) // max(count - 1, 1) for index in range(count)}
    stages = schedule.stages()[: 2 * MOST_BANDS]
    return sorted(spaced | {step for stage in stages for step in (stage.begin, stage.end - 1)})


def text_lines(schedule: Drawable, width: int = 72, height: int = 8, plain: bool = False) -> list[str]:
    """The course as lines of text: columns of blocks (`#` if plain), then a line with `^` under every checkpoint.

    A column is as high as the mean rate of the steps that it stands for.
    """
    columns = min(width, schedule.steps)
    means = [_mean(schedule, column, columns) for column in range(columns)]
    top = max([*means, 1e-12])
    lines = []
    for row in range(height, 0, -1):
        cells = [min(8, max(0, round(8 * (mean / top * height - row + 1)))) for mean in means]
        drawn = "".join((" #"[cell >= 4] if plain else BLOCKS[cell]) for cell in cells)
        share = f"{top:.3g}" if row == height else ""
        lines.append(f"{share:>7} {'|' if plain else '│'}{drawn}".rstrip())
    marks = {min(columns - 1, (done - 1) * columns // schedule.steps) for done in schedule.checkpoints()}
    lines.append(
        f"{0:>7} {'+' if plain else '└'}{''.join('^' if column in marks else '-' for column in range(columns))}"
    )
    lines.append(f"{'':>8} 0{schedule.steps:>{max(1, columns - 1)},}")
    return lines


def _mean(schedule: Drawable, column: int, columns: int) -> float:
    """Mean factor of up to 16 of a column's steps."""
    begin, end = (index * schedule.steps // columns for index in (column, column + 1))
    taken = range(begin, max(end, begin + 1), max(1, (end - begin) // 16))
    return math.fsum(schedule.factor(step) for step in taken) / len(taken)


def _x(step: float, schedule: Drawable) -> float:
    return LEFT + step / schedule.steps * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _bands(schedule: Drawable) -> list[str]:
    found = []
    for stage in schedule.stages()[:MOST_BANDS]:
        begin, end = _x(stage.begin, schedule), _x(stage.end, schedule)
        fill = FILLS.get(stage.name, "#f2f2f2")
        found.append(
            f'<rect x="{begin:.1f}" y="{TOP}" width="{end - begin:.1f}" height="{HEIGHT - BOTTOM - TOP}" fill="{fill}"/>'
        )
    return found


def _grid(schedule: Drawable, top: float, unit: float) -> list[str]:
    found = []
    for value in _ticks(top, 5):
        at = _y(value / top)
        found.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        found.append(_text(f"{value * unit:.3g}", LEFT - 7, at + 4, "end"))
    for value in _ticks(schedule.steps, 6):
        found.append(_text(f"{value:,.6g}", _x(value, schedule), HEIGHT - BOTTOM + 17))
    return found


def _marks(schedule: Drawable, top: float) -> list[str]:
    """A point where every checkpoint is, on the rate of its last step; the first ones with their number of updates.

    Of checkpoints that fall on one pixel the first is drawn.
    """
    found, ends, drawn = [], schedule.checkpoints(), -1
    for index, done in enumerate(ends):
        x, y = _x(done, schedule), _y(schedule.factor(done - 1) / top)
        if round(x) == drawn and index < len(ends) - 1:
            continue
        drawn = round(x)
        found.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{MARK}"/>')
        if len(ends) <= MOST_LABELS or index in (0, len(ends) - 1):
            found.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + 16}" y2="{y:.1f}" stroke="{MARK}" stroke-dasharray="2 3"/>'
            )
            found.append(_text(f"{done:,}", x, TOP + 12, "end" if x > WIDTH - 60 else "middle", MARK))
    return found


def _legend(schedule: Drawable) -> list[str]:
    found, x = [], LEFT
    for name in dict.fromkeys(stage.name for stage in schedule.stages()):
        found.append(
            f'<rect x="{x}" y="26" width="14" height="12" fill="{FILLS.get(name, "#f2f2f2")}" stroke="{GRID}"/>'
        )
        found.append(_text(name, x + 19, 36, "start"))
        x += 40 + 7 * len(name)
    found.append(f'<circle cx="{x + 6}" cy="32" r="4" fill="{MARK}"/>')
    found.append(_text("checkpoint", x + 15, 36, "start"))
    return found


def _ticks(high: float, count: int) -> list[float]:
    """Round values from 0 to `high`."""
    rough = high / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * next(factor for factor in (1, 2, 5, 10) if rough <= factor * size * (1 + 1e-9))
    return [index * step for index in range(math.floor(high / step + 1e-9) + 1)]


def _text(text: str, x: float, y: float, anchor: str = "middle", fill: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}">{escape(text)}</text>'
