"""What a verdict says, in words and in readable units. Shared by the HTML, the Markdown and the terminal
report.

A contrast is kept as the study computed it: a difference (arm - baseline) or a log ratio (ln arm/baseline).
People read ratios better as percent (`-4.1 %`) or, when they are large, as factors (`x2.31`); `EffectScale`
does that and nothing else, so a log ratio of -0.042 and its margin, interval and pairs stay comparable on one
axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torchstone.report import numbers
from torchstone.report.result import Metric, Result, Verdict

ICONS = {"holds": "✓", "fails": "✗", "inconclusive": "?"}
LARGE_LOG_RATIO = 0.5
LEGEND = (
    "Holds: the whole interval lies beyond the margin in the claimed direction. "
    "Fails: the whole interval lies on the other side of the margin. Inconclusive: the "
    "margin is inside the interval. "
    "Detectable: the distance from the margin that so many units find with 80 % power."
)


@dataclass(frozen=True)
class EffectScale:
    """How contrasts are shown: `difference`, `percent` or `factor`, with the metric's unit and decimal
    places."""

    kind: str
    unit: str
    places: int

    @property
    def neutral(self) -> float:
        """The value that means "no effect"."""
        return 1.0 if self.kind == "factor" else 0.0

    def value(self, contrast: float) -> float:
        """A contrast in shown units."""
        if self.kind == "difference":
            return contrast
        bounded = max(-50.0, min(50.0, contrast))
        return math.exp(bounded) if self.kind == "factor" else 100 * math.expm1(bounded)

    def place(self, contrast: float) -> float:
        """Where a contrast stands on an axis: in shown units, but factors by their logarithm (×½ as far as ×2)."""
        return contrast if self.kind == "factor" else self.value(contrast)

    def text(self, contrast: float | None, unit: bool = True) -> str:
        """A contrast as text."""
        if contrast is None:
            return numbers.MISSING
        return self.shown(self.value(contrast), unit)

    def shown(self, value: float, unit: bool = True) -> str:
        """A value that is in shown units already, as text."""
        if self.kind == "factor":
            return f"×{numbers.significant(value)}"
        suffix = "%" if self.kind == "percent" else self.unit
        return numbers.signed(value, self.places) + (f" {suffix}" if unit and suffix else "")

    def detectable(self, contrast: float | None) -> str:
        """A minimum detectable effect: a size, so without sign."""
        return numbers.MISSING if contrast is None else self.text(abs(contrast)).lstrip("+")


def scale_for(verdicts: Iterable[Verdict], metrics: Iterable[Metric]) -> EffectScale:
    """One scale for verdicts on the same metric and contrast."""
    verdicts = list(verdicts)
    first = verdicts[0]
    unit = next((metric.unit for metric in metrics if metric.name == first.metric), "")
    contrasts = [v.margin for v in verdicts] + [v.effect for v in verdicts if v.effect is not None]
    widths = [(v.interval.high - v.interval.low) / 2 for v in verdicts if v.interval]
    for verdict in verdicts:
        contrasts += [verdict.interval.low, verdict.interval.high] if verdict.interval else []
    kind = "difference"
    if first.contrast == "log ratio":
        kind = "factor" if max(map(abs, contrasts)) > LARGE_LOG_RATIO else "percent"
    spread = min((width for width in widths if width > 0), default=max(map(abs, contrasts)) / 10)
    spread = 100 * spread if kind == "percent" else spread
    return EffectScale(kind, unit, numbers.places_for(spread))


def metric_label(name: str, metrics: Iterable[Metric]) -> str:
    """The metric's label, or its name where the result does not describe it."""
    return next((metric.label for metric in metrics if metric.name == name), name)


def contrast_words(verdict: Verdict, metrics: Iterable[Metric]) -> str:
    """What the effect is: "validation loss, differential minus baseline"."""
    if verdict.baseline == "zero":  # the constant, see `torchstone.lab.study.ZERO`
        return f"{metric_label(verdict.metric, metrics)}, {verdict.arm}"
    between = "minus" if verdict.contrast == "difference" else "relative to"
    return f"{metric_label(verdict.metric, metrics)}, {verdict.arm} {between} {verdict.baseline}"


def interval_text(verdict: Verdict, scale: EffectScale) -> str:
    """The interval alone: "-0.055 to -0.027"."""
    if verdict.interval is None:
        return numbers.MISSING
    return f"{scale.text(verdict.interval.low, unit=False)} to {scale.text(verdict.interval.high)}"


def interval_name(verdict: Verdict) -> str:
    """What the interval is called: "95 % interval"."""
    level = verdict.interval.level if verdict.interval else 0.95
    return f"{100 * level:g} % interval"


def claimed(verdict: Verdict, scale: EffectScale) -> str:
    """What the claim needs: "below -0.010 nats"."""
    return f"{'below' if verdict.direction == 'less' else 'above'} {scale.text(verdict.margin)}"


def counted(verdict: Verdict) -> str:
    """The n with its unit: "3 seeds", "1 seed"."""
    unit = verdict.unit_of_n
    return f"{verdict.n} {unit[:-1] if verdict.n == 1 and unit.endswith('s') else unit}"


def reason(verdict: Verdict, most: int = 500) -> str:
    """The verdict's reason, cut where it quotes long errors (the list of cells shows those in full)."""
    line = " ".join(verdict.reason.split())
    return line if len(line) <= most else f"{line[:most].rstrip()} …"


def effect_sentence(verdict: Verdict, metrics: Iterable[Metric], scale: EffectScale) -> str:
    """Effect, interval and n in one sentence without a full stop."""
    if verdict.effect is None:
        return f"{contrast_words(verdict, metrics)}: no effect could be computed ({counted(verdict)})"
    name = interval_name(verdict)
    return (
        f"{contrast_words(verdict, metrics)}: {scale.text(verdict.effect)} "
        f"({name} {interval_text(verdict, scale)}; {counted(verdict)})"
    )


def summary(result: Result) -> str:
    """The whole outcome in a line or two, for people who read nothing else."""
    verdicts = result.verdicts
    if not verdicts:
        outcome = "No claim was tested; the numbers below describe what was measured."
    elif len(verdicts) == 1:
        only = verdicts[0]
        state = "is inconclusive" if only.status == "inconclusive" else only.status
        effect = effect_sentence(only, result.metrics, scale_for(verdicts, result.metrics))
        outcome = f"The claim {state}: {only.sentence.rstrip('.')}. {effect[:1].upper()}{effect[1:]}."
    else:
        outcome = _tally(verdicts)
    if result.scale == "smoke":
        outcome += " This is the smoke scale, which only shows that everything runs: it is no evidence."
    broken = sum(cell.status != "done" for cell in result.cells)
    if broken:
        total = len(result.cells)
        outcome += f" {broken} of {total} cells did not finish; they are listed with their errors."
    return outcome


def _tally(verdicts: tuple[Verdict, ...]) -> str:
    total = len(verdicts)
    phrases = []
    for status, one, many in (
        ("holds", "holds", "hold"),
        ("fails", "fails", "fail"),
        ("inconclusive", "is inconclusive", "are inconclusive"),
    ):
        count = sum(verdict.status == status for verdict in verdicts)
        if count == total:
            return f"{'Both' if total == 2 else f'All {total}'} claims {many}."
        if count:
            phrases.append(f"{count} {one if count == 1 else many}")
    return f"Of {total} claims, {', '.join(phrases[:-1])} and {phrases[-1]}."
