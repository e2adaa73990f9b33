"""The four ways in which a token's loss moves during training (Rho-1, Lin et al., arXiv 2404.07965, section 2.1).

Of each token's losses at M checkpoints a straight line is fitted by least squares through (i, loss_i), i = 0 … M-1. With Δ its
end minus its start, ℓ the last observed loss and ℓ̄ the mean of ℓ over all tokens:

    H>L   Δ < -threshold                  learned during this training
    L>H   Δ > threshold                   forgotten
    L>L   else, ℓ ≤ ℓ̄                    known all along
    H>H   else                            never learned: noise, or too hard

Shapes: n tokens · m checkpoints.

Pitfalls
  ℓ̄        is a mean over the tokens that are given: categories depend on which tokens are looked at together.
  noise     of single losses makes slopes: with few checkpoints and a small threshold, tokens that do not change are called
            learned or forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchstone.errors import ConfigError, DataError

CATEGORIES = ("H>L", "L>H", "H>H", "L>L")
MEANING = {"H>L": "learned", "L>H": "forgotten", "H>H": "never learned", "L>L": "known all along"}
LEAST = 3  # checkpoints; a line through two says nothing of noise
THRESHOLD = 0.2


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Fitted lines and categories.

    Attributes:
        fit_start_n, fit_end_n: the line at the first and the last checkpoint, fp64.
        delta_n: their difference.
        mean_last: mean of the last losses.
        category_n: one of `CATEGORIES` each.
    """

    fit_start_n: NDArray[np.float64]
    fit_end_n: NDArray[np.float64]
    delta_n: NDArray[np.float64]
    mean_last: float
    category_n: NDArray[np.str_]

    def shares(self) -> dict[str, float]:
        """Share of the tokens in each category."""
        return {name: float((self.category_n == name).mean()) for name in CATEGORIES}


def categorise(losses_nm: ArrayLike, threshold: float = THRESHOLD) -> Trajectories:
    """Fit and sort tokens by their losses at M checkpoints.

    Args:
        losses_nm: a row per token, a column per checkpoint, evenly spaced in training.
        threshold: nats of change above which a token has changed.

    Raises:
        ConfigError: a threshold below 0, or fewer than two checkpoints. DataError: no token, or a loss that is not finite.
    """
    losses = np.asarray(losses_nm, dtype=np.float64)
    if losses.ndim != 2 or losses.shape[1] < 2:
        raise ConfigError(
            f"losses of the shape {losses.shape} were given; a line needs a row per token and at least 2 checkpoints."
        )
    if not threshold >= 0:
        raise ConfigError(f"threshold is {threshold}; it is a change in nats, 0 or more.")
    if not len(losses):
        raise DataError("there is no token to sort; give at least one.")
    if not np.isfinite(losses).all():
        token, checkpoint = map(int, np.argwhere(~np.isfinite(losses))[0])
        raise DataError(
            f"the loss of token {token} at checkpoint {checkpoint} is {losses[token, checkpoint]}; it must be finite."
        )
    places_m = np.arange(losses.shape[1]) - (losses.shape[1] - 1) / 2
    slope_n = losses @ places_m / (places_m @ places_m)
    middle_n, delta_n = losses.mean(axis=1), slope_n * (losses.shape[1] - 1)
    last_n = losses[:, -1]
    mean_last = float(last_n.mean())
    category_n = np.where(
        delta_n < -threshold, "H>L", np.where(delta_n > threshold, "L>H", np.where(last_n <= mean_last, "L>L", "H>H"))
    )
    return Trajectories(middle_n - delta_n / 2, middle_n + delta_n / 2, delta_n, mean_last, category_n)


def without_change(losses_nm: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """Losses of tokens that do not change but are as noisy: what `categorise` finds in them is its error.

    Each token's losses lie about its mean as the given ones lie about its fitted line, in random order. Residuals are widened by
    √((M-1)/(M-2)), since a fitted line takes up part of the noise; noiseless lines become constants.

    Args:
        losses_nm: as of `categorise`, with at least three checkpoints.
        seed: of the order.
    """
    losses = np.asarray(losses_nm, dtype=np.float64)
    found, count = categorise(losses), losses.shape[1]
    if count < LEAST:
        raise ConfigError(f"{count} checkpoints were given; the noise about a line needs at least {LEAST}.")
    lines_nm = found.fit_start_n[:, None] + found.delta_n[:, None] * np.linspace(0, 1, count)
    widening = np.sqrt((count - 1) / (count - 2))
    residuals_nm = np.random.default_rng(seed).permuted((losses - lines_nm) * widening, axis=1)
    return losses.mean(axis=1, keepdims=True) + residuals_nm


def shares_so_far(losses_nm: ArrayLike, threshold: float = THRESHOLD) -> list[dict[str, float]]:
    """Shares of the categories over the first 3, 4, … M checkpoints."""
    losses = np.asarray(losses_nm)
    return [categorise(losses[:, :count], threshold).shares() for count in range(LEAST, losses.shape[1] + 1)]
