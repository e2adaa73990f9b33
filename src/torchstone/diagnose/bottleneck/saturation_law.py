"""Excess loss against a scaling law: does a small model end above what larger models predict for its size?

    L(N, D) = E + A / N^a + B / D^b        N parameters, D training tokens
    excess  = L_final / L_predicted − 1

The data side (E, B, b) keeps the constants of Hoffmann et al. (arXiv 2203.15556), and A and a are fitted on the models above
the suspected range, as in Godey et al. (arXiv 2404.07647): Huber loss with δ = 1e-3 on the residuals of log L, from several
starts. The interval resamples whole models, since checkpoints of one model are not independent.

Pitfall: a fixed learning-rate schedule bends the end of every run; compare checkpoints at equal positions in their schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from torchstone.errors import DataError

FLOOR, DATA_FACTOR, DATA_POWER = 1.69, 410.7, 0.28  # E, B, b of Hoffmann et al.
DELTA = 1e-3
STARTS = tuple(
    (size, power) for size in (0.05, 0.2, 1.0) for power in (0.1, 0.25, 0.5)
)  # A / N^a at the middle size, a


class Run(NamedTuple):
    """One evaluated checkpoint: its model's name and parameters, tokens seen, loss in nats per token."""

    model: str
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """A and a of the size term; the other constants are fixed."""

    factor: float
    power: float

    def predict(self, parameters: float, tokens: float) -> float:
        """Loss in nats per token."""
        return FLOOR + self.factor / parameters**self.power + DATA_FACTOR / tokens**DATA_POWER

    def excess(self, run: Run) -> float:
        """Share by which a checkpoint's loss is above the prediction."""
        return run.loss / self.predict(run.parameters, run.tokens) - 1


def fit_law(runs: Sequence[Run], starts: Sequence[tuple[float, float]] = STARTS) -> Law:
    """A and a that fit the runs best.

    Args:
        runs: evaluated checkpoints.
        starts: of the search: the size term A / N^a at the geometric mean of the sizes, and a.

    Raises:
        DataError: fewer than two sizes, or numbers that are not positive.
    """
    table_n3 = np.array([[run.parameters, run.tokens, run.loss] for run in runs], dtype=np.float64).reshape(-1, 3)
    if len(set(table_n3[:, 0])) < 2 or not (np.isfinite(table_n3).all() and (table_n3 > 0).all()):
        raise DataError(
            f"a law over sizes needs checkpoints of at least 2 sizes with positive finite numbers; {len(runs)} checkpoints of "
            f"{len(set(table_n3[:, 0]))} sizes were given."
        )
    middle = float(np.log(table_n3[:, 0]).mean())
    table_n3[:, 0] = np.log(table_n3[:, 0]) - middle
    fits = [minimize(_loss, (np.log(size), power), args=(table_n3,), method="L-BFGS-B") for size, power in starts]
    best = min(fits, key=lambda fit: float(fit.fun))
    height, power = minimize(
        _loss, best.x, args=(table_n3,), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-7}
    ).x
    return Law(float(np.exp(height + power * middle)), float(power))


def excess_interval(
    run: Run, fitted_on: Sequence[Run], resamples: int = 200, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of a checkpoint's excess over resampled models of the fit; None with fewer than 3 models."""
    models = sorted({other.model for other in fitted_on})
    if len(models) < 3:
        return None
    generator = np.random.default_rng(seed)
    law = fit_law(fitted_on)
    middle = np.exp(np.mean([np.log(other.parameters) for other in fitted_on]))
    start = (float(law.factor / middle**law.power), law.power)
    by_model = {model: [other for other in fitted_on if other.model == model] for model in models}
    values = []
    for _ in range(resamples):
        chosen = generator.choice(models, len(models))
        drawn = [other for model in chosen for other in by_model[model]]
        if len({other.parameters for other in drawn}) > 1:
            values.append(fit_law(drawn, (start,)).excess(run))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _loss(x: NDArray[np.float64], table_n3: NDArray[np.float64]) -> float:
    size_n, tokens_n, loss_n = table_n3.T
    exponent_n = np.clip(x[0] - x[1] * size_n, -50, 50)  # a line search may try anything
    predicted_n = FLOOR + np.exp(exponent_n) + DATA_FACTOR / tokens_n**DATA_POWER
    residual_n = np.abs(np.log(predicted_n) - np.log(loss_n))
    return float(np.where(residual_n <= DELTA, residual_n**2 / 2, DELTA * (residual_n - DELTA / 2)).sum() * 1e6)
