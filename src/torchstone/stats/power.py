"""What a number of units can show: power, minimum detectable effect, units needed.

For n paired units with standard deviation sd the two-sided t interval excludes the margin on the right side
with probability P(T > c), T noncentral t with n - 1 degrees of freedom and noncentrality d sqrt(n) / sd,
where d is the distance between effect and margin and c the critical value.

Before a run, sd is an assumption; after it, the observed sd. `power(observed effect)` after the run is a
restatement of the p-value and is not offered; `units_needed` answers the useful question instead, what a
repetition would take if effect and spread were as observed. With few units that is a rough figure: sd from
3 units is uncertain by a factor 2.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import nctdtr

from torchstone.errors import StudyError
from torchstone.stats.estimate import t_critical


def power(distance: float, sd: float, n: int, *, level: float = 0.95, critical: float | None = None) -> float:
    """Probability that n units decide for an effect that lies `distance` beyond the margin.

    Args:
        distance: |effect - margin|, >= 0.
        sd: standard deviation of one paired contrast, > 0.
        n: units, >= 2.
        level: of the two-sided interval; ignored where `critical` is given.
        critical: critical value other than the t quantile.
    """
    _check(sd, n)
    bound = t_critical(n, level) if critical is None else critical
    return float(1 - nctdtr(n - 1, abs(distance) / sd * np.sqrt(n), bound))


def minimum_detectable_effect(sd: float, n: int, *, level: float = 0.95, chance: float = 0.8) -> float | None:
    """Distance from the margin that n units decide with probability `chance`; None for n < 2.

    Args:
        sd: standard deviation of one paired contrast; 0 gives 0.
        n: units.
        level: of the two-sided interval.
        chance: the power, 0.8 by convention.
    """
    if n < 2:
        return None
    if sd == 0:
        return 0.0
    _check(sd, n)
    upper = 4.0
    while power(upper, 1.0, n, level=level) < chance:
        upper *= 2
    return sd * float(brentq(lambda d: power(d, 1.0, n, level=level) - chance, 0.0, upper, xtol=1e-9))


def units_needed(
    distance: float, sd: float, *, level: float = 0.95, chance: float = 0.8, limit: int = 100_000
) -> int | None:
    """Smallest n that decides with probability `chance` for an effect `distance` beyond the margin.

    Returns None if the distance is 0 or more than `limit` units would be needed.
    """
    if distance == 0 or not np.isfinite(distance):
        return None
    if sd == 0:
        return 2
    _check(sd, 2)

    def enough(n: int) -> bool:
        return power(distance, sd, n, level=level) >= chance

    if not enough(limit):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(limit, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _check(sd: float, n: int) -> None:
    if not (sd > 0 and np.isfinite(sd)):
        raise StudyError(f"a standard deviation must be a finite number above 0; given {sd!r}.")
    if n < 2:
        raise StudyError(f"power needs at least 2 units; given {n}.")
