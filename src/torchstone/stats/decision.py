"""The verdict rule: from an interval to holds, fails or inconclusive.

    holds          the whole interval lies beyond the margin in the claimed direction
    fails          the whole interval lies on the other side of the margin
    inconclusive   the interval contains the margin, or there is no interval

With a two-sided 95 % interval, arms whose true contrast equals the margin hold in 2.5 % and fail in 2.5 %
of studies. Each claim is decided on its own; a study with k claims about arms that do nothing has 0.025 k
false holds on average (`expected_false_holds`), which the report states. Margin 0 and a one-sided reading
are the usual case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torchstone.errors import StudyError
from torchstone.stats.estimate import Estimate, check_level

Direction = Literal["greater", "less"]
Status = Literal["holds", "fails", "inconclusive"]


@dataclass(frozen=True)
class Decision:
    """A status and, in one sentence, why."""

    status: Status
    reason: str


def decide(estimate: Estimate, *, margin: float = 0.0, direction: Direction = "greater") -> Decision:
    """Apply the verdict rule.

    Args:
        estimate: effect and interval.
        margin: signed, in the unit of the contrast.
        direction: `greater` if the claim is effect > margin, `less` if it is effect < margin.

    Raises:
        StudyError: unknown direction, or a margin that is not finite.
    """
    if direction not in ("greater", "less"):
        raise StudyError(f"unknown direction {direction!r}; allowed: 'greater', 'less'.")
    if not math.isfinite(margin):
        raise StudyError(f"the margin of a claim must be finite; given {margin!r}.")
    if estimate.low is None or estimate.high is None:
        return Decision("inconclusive", estimate.note)
    interval = f"{estimate.level:.0%} interval [{estimate.low:.4g}, {estimate.high:.4g}]"
    above, below = estimate.low > margin, estimate.high < margin
    if not above and not below:
        return Decision("inconclusive", _with_note(f"{interval} contains the margin {margin:g}", estimate))
    side = "above" if above else "below"
    status: Status = "holds" if above == (direction == "greater") else "fails"
    return Decision(status, _with_note(f"{interval} lies {side} the margin {margin:g}", estimate))


def expected_false_holds(claims: int, level: float = 0.95) -> float:
    """Mean number of holding claims in a study whose `claims` true contrasts all equal their margins."""
    return claims * (1 - check_level(level)) / 2


def _with_note(sentence: str, estimate: Estimate) -> str:
    return f"{sentence}; {estimate.note}" if estimate.note else sentence
