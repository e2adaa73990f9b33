"""Adding seeds until a claim is decided, without raising the error rate.

Testing after 3, 5, 8 and 10 seeds at the usual 5 % each would call identical arms different in about 12 %
of studies. A group-sequential design declares its looks beforehand and spends the 5 % over them (Lan &
DeMets 1983):

    linear           a look at n of N seeds may have spent 5 % × n / N; decides large effects early
    obrien-fleming   2 - 2 Φ(z / sqrt(n / N)); hardly anything early, the last look is nearly a fixed design

With 3 to 10 seeds the variance is estimated too, so normal-theory boundaries are wrong (a t of 2 degrees of
freedom exceeds 4.3 in 5 % of cases). The boundaries here are those of the t statistics themselves: under
equality the vector (t at look 1, …, t at look K) does not depend on the unknown variance, so it is
simulated once, a million times with a fixed generator, and each boundary is read off such that exactly the
declared error is spent. The first one is the exact t quantile. Looks beyond the boundary stop; both sides,
holds and fails, have half of the error each.

The interval at every look is mean ± boundary × standard error. It is the *repeated* interval: all looks
together cover the true contrast with probability 95 %, so it stays valid whichever look is the last, and
the verdict can be read from it as from an ordinary one. A single early look covers more than 95 %.

Pitfall: looks that were not declared, or a maximum raised after seeing numbers, void the guarantee.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtrit

from torchstone.errors import StudyError
from torchstone.stats.contrasts import finite
from torchstone.stats.estimate import Estimate, check_level, t_estimate

Spending = Literal["linear", "obrien-fleming"]
_SIMULATIONS = 1_000_000
_SEED = 20240611


@dataclass(frozen=True)
class SequentialDesign:
    """Numbers of seeds at which the claims are looked at, and how the error is spent over them.

    Attributes:
        looks: increasing numbers of seeds, the first at least 2; the last is the maximum.
        level: simultaneous coverage of the intervals.
        spending: `linear` or `obrien-fleming`.

    Raises:
        StudyError: looks that do not increase or start below 2, unknown spending.
    """

    looks: tuple[int, ...]
    level: float = 0.95
    spending: Spending = "linear"

    def __post_init__(self) -> None:
        check_level(self.level)
        increasing = all(a < b for a, b in zip(self.looks, self.looks[1:], strict=False))
        if not self.looks or self.looks[0] < 2 or not increasing:
            raise StudyError(f"looks must be increasing numbers of seeds from 2 on; given {self.looks}.")
        if self.spending not in ("linear", "obrien-fleming"):
            raise StudyError(f"unknown spending {self.spending!r}; allowed: 'linear', 'obrien-fleming'.")

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Critical value of |t| at every look; infinite where nothing may be spent yet."""
        return _boundaries(self.looks, self.level, self.spending)

    def critical(self, n: int) -> float:
        """Critical value at the look with n seeds; StudyError if n is not a declared look."""
        if n not in self.looks:
            declared = ", ".join(map(str, self.looks))
            raise StudyError(f"{n} seeds is not a declared look of this design; declared: {declared}.")
        return self.boundaries[self.looks.index(n)]

    def estimate(
        self, values: ArrayLike, *, margin: float = 0.0, resolution: float = 0.0, deterministic: bool = False
    ) -> Estimate:
        """Estimate with the repeated interval; the number of values must be a declared look."""
        values_n = finite(values, "contrasts")
        return t_estimate(
            values_n,
            level=self.level,
            margin=margin,
            critical=self.critical(values_n.size),
            resolution=resolution,
            deterministic=deterministic,
        )

    def minimum_detectable_effect(self, sd: float, *, chance: float = 0.8) -> float:
        """Distance from the margin that the whole design decides with probability `chance`, by simulation."""
        bounds = np.array(self.boundaries)

        def missing(distance: float) -> float:
            statistics_kn = simulate_statistics(self.looks, 50_000, np.random.default_rng(_SEED), distance)
            return chance - float((statistics_kn > bounds[:, None]).any(axis=0).mean())

        upper = 2.0
        while missing(upper) > 0:
            upper *= 2
        return sd * float(brentq(missing, 0.0, upper, xtol=1e-3))


def declared_looks(start: int, maximum: int) -> tuple[int, ...]:
    """Looks from `start` seeds to `maximum`, each about half as many seeds again (3, 5, 8, 10 for 3 to 10).

    Fewer looks cost less power than one after every seed, and seeds run in parallel anyway.

    Raises:
        StudyError: start below 2 or above the maximum.
    """
    if not 2 <= start <= maximum:
        raise StudyError(f"a sequential run needs 2 <= first seeds <= maximum seeds; given {start} and {maximum}.")
    looks = [start]
    while looks[-1] < maximum:
        looks.append(min(maximum, math.ceil(1.5 * looks[-1])))
    return tuple(looks)


def simulate_statistics(
    looks: tuple[int, ...], count: int, generator: np.random.Generator, distance: float = 0.0
) -> NDArray[np.float64]:
    """(K, count) t statistics at the looks of `count` studies whose contrasts are normal(distance, 1).

    Blocks of seeds between looks enter by their mean and their sum of squares (independent, normal and
    chi-squared), merged by the parallel-variance update, so the cost does not depend on the number of
    seeds.
    """
    statistics_kn = np.empty((len(looks), count))
    mean_n, squares_n, seen = np.zeros(count), np.zeros(count), 0
    for k, look in enumerate(looks):
        block = look - seen
        block_mean_n = distance + generator.standard_normal(count) / math.sqrt(block)
        if block > 1:
            squares_n += generator.chisquare(block - 1, count)
        gap_n = block_mean_n - mean_n
        if seen:
            squares_n += gap_n**2 * seen * block / look
        mean_n += gap_n * block / look
        seen = look
        statistics_kn[k] = mean_n / np.sqrt(squares_n / (look - 1) / look)
    return statistics_kn


def spent(fraction: float, alpha: float, spending: Spending) -> float:
    """Two-sided error that may be spent once `fraction` (0 to 1) of the maximum seeds is in."""
    if spending == "linear":
        return alpha * fraction
    return float(2 * (1 - ndtr(ndtri(1 - alpha / 2) / math.sqrt(fraction))))


@lru_cache(maxsize=64)
def _boundaries(looks: tuple[int, ...], level: float, spending: Spending) -> tuple[float, ...]:
    alpha = 1 - level
    first = spent(looks[0] / looks[-1], alpha, spending)
    bounds = [float(-stdtrit(looks[0] - 1, first / 2))]
    if len(looks) == 1:
        return tuple(bounds)
    size_kn = np.abs(simulate_statistics(looks, _SIMULATIONS, np.random.default_rng(_SEED)))
    crossed = size_kn[0] > bounds[0]
    for k, look in enumerate(looks[1:], start=1):
        total = spent(look / looks[-1], alpha, spending)
        allowed = max(0, int(total * _SIMULATIONS) - int(crossed.sum()))
        alive = np.sort(size_kn[k][~crossed])
        usual = float(stdtrit(look - 1, level / 2 + 0.5))
        bounds.append(max(usual, float(alive[-allowed - 1])) if allowed else math.inf)
        crossed |= size_kn[k] > bounds[k]
    return tuple(bounds)
