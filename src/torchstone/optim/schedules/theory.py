"""Why a decay pays, and why its best shape is `inv`: stochastic gradient descent on one noisy slope.

On a loss ½ a x² with gradients a x + noise of variance s², a step η takes the variance v of x to

    v ← (1 − ηa)² v + η² s²

    plateau   at a constant η, v settles where this maps it to itself, and the mean loss ½ a v is η s² / (2 (2 − ηa))
    greedy    the η that makes the next v smallest is a v / (a² v + s²); taken at every step, 1/η grows by a each time: a
              straight line in 1/rate, which is the shape `inv`

Down the valley, where curvature is close to 0, what counts is the sum of the rates: `progress` is that sum, the x-axis on which
the losses of slow directions fall onto one curve, whatever the schedule.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Schedule


def plateau_loss(rate: float, curvature: float, noise: float) -> float:
    """Mean loss above the minimum at a constant rate; `noise` is the variance of a gradient.

    Raises:
        ConfigError: the rate is not between 0 and 2/curvature, where the variance settles.
    """
    if curvature <= 0 or not 0 < rate * curvature < 2:
        raise ConfigError(
            f"at a rate of {rate:g} and a curvature of {curvature:g} there is no plateau; give a curvature above 0 and a rate "
            "above 0 and below 2/curvature."
        )
    return rate * noise / (2 * (2 - rate * curvature))


def next_variance(rate: float, variance: float, curvature: float, noise: float) -> float:
    """Variance after one step."""
    return (1 - rate * curvature) ** 2 * variance + rate**2 * noise


def greedy_rate(variance: float, curvature: float, noise: float) -> float:
    """The rate after which the variance is smallest."""
    return curvature * variance / (curvature**2 * variance + noise)


def progress(schedule: Schedule) -> NDArray[np.float64]:
    """Area under a schedule: sum of the factors of all steps before s, for s = 0 … steps."""
    factors = [schedule.factor(step) for step in range(schedule.steps)]
    return np.concatenate([[0.0], np.cumsum(factors)])
