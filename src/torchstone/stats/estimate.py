"""Interval estimates of a mean contrast.

`t_estimate` is for seeds: few, independent, roughly normal units. The interval is

    mean ± c * s / sqrt(n),   c = the t quantile with n - 1 degrees of freedom

or a larger `critical` value where a sequential design looks more than once.

Zero spread. If all n contrasts are equal, s = 0 and the formula would give an interval of no width:
certainty out of three numbers on a coarse grid (accuracy on 50 questions is often equal by chance). The
spread is then unknown, not zero. What n equal contrasts do show, without any assumption on the
distribution, is that their median lies there: the order-statistic interval [min, max] covers the median
with probability 1 - 2^(1-n). So an interval is given only if 2^(1-n) <= 1 - level, for 95 % from n = 6.
Below that there is none, unless the caller states that the numbers are deterministic (no seed, no sampling
enters), in which case one contrast is the whole truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

from torchstone.errors import StudyError
from torchstone.stats.contrasts import finite

TINY = 1e-150  # below it, squares of deviations underflow

IntervalMethod = Literal["t", "percentile-t", "identical", "deterministic", "none"]


@dataclass(frozen=True)
class Estimate:
    """A mean contrast with its uncertainty.

    Attributes:
        effect: the mean contrast.
        low, high: ends of the two-sided interval; None where no interval exists (see `note`).
        level: its nominal coverage.
        n: independent units.
        sd: standard deviation of one unit's contrast; None if n < 2.
        standard_error: of `effect`; None if n < 2.
        margin: the value that the p-values test against.
        p_greater, p_less, p_two_sided: p-values of effect > margin, effect < margin, effect != margin.
        method: where the interval comes from.
        note: why there is no interval, or what is special about it.
    """

    effect: float
    low: float | None
    high: float | None
    level: float
    n: int
    sd: float | None = None
    standard_error: float | None = None
    margin: float = 0.0
    p_greater: float | None = None
    p_less: float | None = None
    p_two_sided: float | None = None
    method: IntervalMethod = "t"
    note: str = ""


def t_critical(n: int, level: float = 0.95) -> float:
    """Two-sided critical value of the t distribution with n - 1 degrees of freedom."""
    return float(stdtrit(n - 1, 0.5 + check_level(level) / 2))


def t_estimate(
    values: ArrayLike,
    *,
    level: float = 0.95,
    margin: float = 0.0,
    critical: float | None = None,
    resolution: float = 0.0,
    deterministic: bool = False,
) -> Estimate:
    """Mean of independent contrasts with a t interval.

    Args:
        values: (n,) one contrast per seed.
        level: nominal coverage of the two-sided interval.
        margin: what the p-values test against.
        critical: multiplier of the standard error; None takes the t quantile, a sequential design more.
        resolution: a range of values up to this is rounding noise, treated as no spread
            (`Contrasts.resolution`).
        deterministic: the caller states that neither seed nor sampling enters the numbers.

    Raises:
        StudyError: no value, or a value that is not finite.
    """
    values_n = finite(values, "contrasts")
    check_level(level)
    n, effect = values_n.size, float(values_n.mean())
    if deterministic:
        return _deterministic(values_n, effect, level, margin, resolution)
    if n < 2:
        note = "one unit has no spread to judge by; at least 2 are needed, better 5"
        return Estimate(effect, None, None, level, n, margin=margin, method="none", note=note)
    if critical is not None and not np.isfinite(critical):
        note = f"the sequential design decides nothing at {n} seeds"
        return Estimate(effect, None, None, level, n, margin=margin, method="none", note=note)
    if float(np.ptp(values_n)) <= max(resolution, 1e-12 * abs(effect), TINY):
        nominal = 1 - level if critical is None else 2 * float(stdtr(n - 1, -critical))
        return identical_estimate(effect, n, level, nominal, margin)
    sd = float(values_n.std(ddof=1))
    error = sd / n**0.5
    half = (t_critical(n, level) if critical is None else critical) * error
    statistic = (effect - margin) / error
    p_less, p_greater = float(stdtr(n - 1, statistic)), float(stdtr(n - 1, -statistic))
    return Estimate(
        effect, effect - half, effect + half, level, n, sd, error, margin,
        p_greater=p_greater, p_less=p_less, p_two_sided=min(1.0, 2 * min(p_less, p_greater)), method="t",
    )  # fmt: skip


def identical_estimate(effect: float, n: int, level: float, nominal: float, margin: float) -> Estimate:
    """Estimate from n >= 2 equal contrasts; `nominal` is the two-sided error that its interval may have."""
    needed = units_for_identical(nominal)
    known = n >= needed
    note = f"all {n} contrasts are equal, so their spread is unknown; " + (
        "the interval is that of the median by order statistics"
        if known
        else f"equal contrasts decide from {needed} units on"
    )
    end = effect if known else None
    return Estimate(effect, end, end, level, n, 0.0, 0.0, margin, method="identical", note=note)


def units_for_identical(nominal: float) -> int:
    """Smallest n at which n equal contrasts have a two-sided error of at most `nominal`: 2^(1-n)."""
    return max(2, int(np.ceil(1 - np.log2(nominal) - 1e-12)))


def check_level(level: float) -> float:
    """`level` itself if it lies strictly between 0.5 and 1, else StudyError."""
    if not 0.5 < level < 1:
        raise StudyError(f"an interval's level must lie between 0.5 and 1 (0.95 is usual); given {level!r}.")
    return level


def _deterministic(values_n: np.ndarray, effect: float, level: float, margin: float, resolution: float) -> Estimate:
    if float(np.ptp(values_n)) > max(resolution, 1e-12 * abs(effect)):
        raise StudyError(
            f"the numbers were declared deterministic but the {values_n.size} contrasts differ "
            f"({values_n.min():g} to {values_n.max():g}). Drop the declaration, so that their spread counts."
        )
    note = "declared deterministic: neither seed nor sampling enters, so the contrast is exact"
    return Estimate(effect, effect, effect, level, values_n.size, 0.0, 0.0, margin, method="deterministic", note=note)
