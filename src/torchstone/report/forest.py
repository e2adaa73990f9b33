"""Forest plots: effect and interval of a claim against its margin, with a dot for every pair, as inline SVG.

Drawn without a script, so it prints and shows where scripts are off. Horizontal positions are percentages and
vertical ones pixels: the picture stretches with the page and its text keeps its size. The region that would
support the claim is tinted; the solid line is "no effect", the dashed one the margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchstone.report import numbers, words
from torchstone.report.markup import Markup, element
from torchstone.report.result import Metric, Verdict
from torchstone.report.words import EffectScale

MOST_DOTS = 120
TOP, DOTS, BAR, AXIS, HEIGHT = 4, 17, 40, 58, 80


@dataclass(frozen=True)
class Frame:
    """The horizontal axis, in the units of `EffectScale.place`."""

    scale: EffectScale
    low: float
    high: float

    def x(self, value: float) -> str:
        """Position of a place, as a percentage of the width."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def frame_for(verdicts: Sequence[Verdict], metrics: Sequence[Metric]) -> Frame:
    """An axis that shows everything of these verdicts, which share a metric and a contrast."""
    scale = words.scale_for(verdicts, metrics)
    values = [scale.place(0.0)]
    for verdict in verdicts:
        values.append(scale.place(verdict.margin))
        values += [scale.place(pair.contrast) for pair in _dots(verdict)]
        if verdict.effect is not None:
            values.append(scale.place(verdict.effect))
        if verdict.interval is not None:
            values += [scale.place(verdict.interval.low), scale.place(verdict.interval.high)]
    low, high = numbers.bounds(values)
    room = 0.08 * (high - low)
    return Frame(scale, low - room, high + room)


def plot(verdict: Verdict, metrics: Sequence[Metric], color: int, frame: Frame | None = None) -> Markup:
    """The strip of one verdict."""
    frame = frame or frame_for([verdict], metrics)
    scale = frame.scale
    margin, neutral = scale.place(verdict.margin), scale.place(0.0)
    parts = [
        _support(verdict, frame, margin),
        _axis(frame),
        _rule(frame.x(neutral), "neutral"),
        _rule(frame.x(margin), "margin"),
        *_dot_marks(verdict, frame),
        *_estimate(verdict, frame),
    ]
    description = (
        f"{words.effect_sentence(verdict, metrics, scale)}; claimed {words.claimed(verdict, scale)}. "
        f"{f'Dots are single {verdict.unit_of_n}.' if verdict.pairs else ''}"
    )
    return element(
        "svg",
        element("title", numbers.typeset(description)),
        parts,
        class_=f"forest arm-{color % 8}",
        role="img",
        height=HEIGHT,
        aria_label=numbers.typeset(description),
    )


def overview(verdicts: Sequence[Verdict], metrics: Sequence[Metric], colors: dict[str, int]) -> Markup:
    """Verdicts on one metric, one below the other, on a shared axis."""
    frame = frame_for(verdicts, metrics)
    rows = []
    for verdict in verdicts:
        label = element(
            "div",
            element("span", words.ICONS[verdict.status], class_=f"mark {verdict.status}", aria_hidden="true"),
            element("span", element("bdi", verdict.arm), " against ", element("bdi", verdict.baseline)),
            element("small", verdict.claim),
            class_="forest-label",
        )
        rows.append(
            element("div", label, plot(verdict, metrics, colors.get(verdict.arm, 1), frame), class_="forest-row")
        )
    return element("div", rows, class_="forest-rows")


def _dots(verdict: Verdict) -> list:
    stride = max(1, -(-len(verdict.pairs) // MOST_DOTS))
    return list(verdict.pairs[::stride])


def _support(verdict: Verdict, frame: Frame, margin: float) -> Markup:
    share = float(frame.x(margin)[:-1])
    start, width = (0.0, share) if verdict.direction == "less" else (share, 100 - share)
    return element("rect", class_="support", x=f"{start:.2f}%", y=TOP, width=f"{width:.2f}%", height=AXIS - TOP)


def _rule(x: str, kind: str) -> Markup:
    return element("line", class_=kind, x1=x, x2=x, y1=TOP, y2=AXIS)


def _axis(frame: Frame) -> list[Markup]:
    marks = [element("line", class_="axis", x1="0%", x2="100%", y1=AXIS, y2=AXIS)]
    if frame.scale.kind == "factor":
        steps = numbers.factor_ticks(frame.low, frame.high, most=6)
    else:
        steps = numbers.ticks(frame.low, frame.high, most=5)
    spacing = steps[1] - steps[0] if len(steps) > 1 else frame.high - frame.low
    scale = EffectScale(frame.scale.kind, "", min(frame.scale.places, numbers.places_for(spacing, digits=1)))
    for value in steps:
        x = frame.x(value)
        marks.append(element("line", class_="axis", x1=x, x2=x, y1=AXIS, y2=AXIS + 4))
        if not 3 <= float(x[:-1]) <= 97:
            continue
        label = numbers.typeset(scale.shown(math.exp(value) if scale.kind == "factor" else value, unit=True))
        marks.append(element("text", label, x=x, y=HEIGHT - 5, text_anchor="middle"))
    return marks


def _dot_marks(verdict: Verdict, frame: Frame) -> list[Markup]:
    marks = []
    for index, pair in enumerate(_dots(verdict)):
        text = f"{pair.unit}: {numbers.typeset(frame.scale.text(pair.contrast))}"
        y = DOTS + (index % 3 - 1) * 5
        x = frame.x(frame.scale.place(pair.contrast))
        marks.append(element("circle", element("title", text), class_="pair", cx=x, cy=y, r="3.5"))
    return marks


def _estimate(verdict: Verdict, frame: Frame) -> list[Markup]:
    marks = []
    if verdict.interval is not None:
        low, high = (frame.x(frame.scale.place(end)) for end in (verdict.interval.low, verdict.interval.high))
        marks.append(element("line", class_="interval", x1=low, x2=high, y1=BAR, y2=BAR))
        marks += [element("line", class_="interval", x1=x, x2=x, y1=BAR - 6, y2=BAR + 6) for x in (low, high)]
    if verdict.effect is not None:
        marks.append(element("circle", class_="effect", cx=frame.x(frame.scale.place(verdict.effect)), cy=BAR, r=6))
    return marks
