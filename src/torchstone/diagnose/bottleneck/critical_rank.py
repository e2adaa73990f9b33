"""Loss gaps against the rank of a head: the rank at which nothing is lost any more, and a power law through the gaps.

    critical rank   the rank r* with gap(r*) = threshold (0.01 nats), between the two measured ranks around it on a log-log
                    line (log-linear where a gap is not positive)
    power law       gap(r) ≈ c · r^(−p), least squares on logarithms over the ranks with a positive gap

Pitfall: a critical rank outside the measured ranks is None, not an extrapolation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from torchstone.errors import DataError

THRESHOLD = 0.01  # nats


class PowerLaw(NamedTuple):
    """gap(r) ≈ c · r^(−p)."""

    c: float
    p: float


def power_law(ranks: Sequence[float], gaps: Sequence[float]) -> PowerLaw | None:
    """The law through the positive gaps; None if fewer than two are positive."""
    points = [(math.log(rank), math.log(gap)) for rank, gap in zip(ranks, gaps, strict=True) if gap > 0]
    if len(points) < 2:
        return None
    x_n, y_n = np.array(points).T
    slope, height = np.polyfit(x_n, y_n, 1)
    return PowerLaw(math.exp(float(height)), -float(slope))


def critical_rank(ranks: Sequence[float], gaps: Sequence[float], threshold: float = THRESHOLD) -> float | None:
    """The rank above which gaps stay at or below the threshold; None if that is outside the ranks.

    Args:
        ranks: in any order, each once.
        gaps: nats, one per rank.
        threshold: nats, above 0.

    Raises:
        DataError: lengths differ, a number is not finite, or the threshold is not positive.
    """
    if len(ranks) != len(gaps) or not np.isfinite([*ranks, *gaps]).all() or threshold <= 0:
        raise DataError(
            "a critical rank needs one finite gap per rank and a positive threshold; given: "
            f"{len(ranks)} ranks, {len(gaps)} gaps, threshold {threshold:g}."
        )
    points = sorted(zip(ranks, gaps, strict=True))
    above = [index for index, (_, gap) in enumerate(points) if gap > threshold]
    if not above or above[-1] == len(points) - 1:
        return None
    (low, high_gap), (high, low_gap) = points[above[-1]], points[above[-1] + 1]
    if low_gap > 0:
        share = math.log(high_gap / threshold) / math.log(high_gap / low_gap)
    else:
        share = (high_gap - threshold) / (high_gap - low_gap)
    return low * (high / low) ** share
