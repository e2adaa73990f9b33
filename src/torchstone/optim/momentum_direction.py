"""What the inner rules of our optimizers have in common: a direction d is a mixture of momentum and gradient, normalised.

    x = a m + b g,   m ← c m + e g,   d = scale · { x  |  sign(x)  |  x / (√(v/(1−β2^t)) + ε),  v ← β2 v + (1−β2) g² }

m and g of the first sum are those before the update. The coefficients make it a published rule:

    SGDM    x = m_t                        a, b = μ, 1              c, e = μ, 1
    AdamW   x = m_t / (1−β1^t)             a, b ∝ β1, 1−β1          c, e = β1, 1−β1        divided by √v
    Lion    x = β1 m + (1−β1) g            a, b = β1, 1−β1          c, e = β2, 1−β2        sign
    LionA   x = m_t                        a, b = β, 1−β            c, e = β, 1−β          γ · sign
            x = β m_t + (1−β) g            a, b = β², 1−β²          (Nesterov)

so Nesterov's momentum with β is Lion's direction with β1 = β², β2 = β.

Bias correction of a momentum that starts at 0, with β of the average:

    none      nothing
    adam      m / (1−β^t) in the place of m. A sign does not see it, except in the mixture of Nesterov's momentum
    inverse   the normalised update times (1−β^t): neither sign nor normalisation makes small early momentum large again
    rms       times √(1−β^{2t}), the root mean square of an early average relative to a late one
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torchstone.errors import ConfigError
from torchstone.optim.angle import average_rms

BiasCorrection = Literal["none", "adam", "inverse", "rms"]
Normaliser = Literal["none", "sign", "rms"]


@dataclass(frozen=True)
class Direction:
    """The coefficients of one step of a rule.

    Attributes:
        moment, gradient: a and b. keep, take: c and e. normaliser: `rms` is the division by √v.
        scale: of d. beta2, root, eps: of `rms`; root is 1/√(1−β2^t).
    """

    moment: float
    gradient: float
    keep: float
    take: float
    normaliser: Normaliser = "none"
    scale: float = 1.0
    beta2: float = 0.0
    root: float = 1.0
    eps: float = 0.0


def update_factor(correction: BiasCorrection, beta: float, step: int) -> float:
    """What multiplies the normalised update at step t = 1, 2, …: 1 except under `inverse` and `rms`."""
    if correction == "inverse":
        return 1 - beta**step
    return math.sqrt(1 - beta ** (2 * step)) if correction == "rms" else 1.0


def adamw(betas: tuple[float, float], eps: float, correction: BiasCorrection, step: int) -> Direction:
    """AdamW; its own bias correction of m is `adam`, to whose result `inverse` and `rms` apply their factor."""
    beta1, beta2 = betas
    scale = 1.0 if correction == "none" else 1 / (1 - beta1**step)
    root = 1 / math.sqrt(1 - beta2**step)
    return Direction(beta1, 1 - beta1, beta1, 1 - beta1, "rms", scale, beta2, root, eps)


def sgdm(momentum: float, correction: BiasCorrection, step: int) -> Direction:
    """SGD with momentum; the buffer is a sum, not an average."""
    scale = 1 / (1 - momentum**step) if correction == "adam" else 1.0
    return Direction(momentum, 1.0, momentum, 1.0, scale=scale)


def lion(betas: tuple[float, float]) -> Direction:
    """Lion (Chen et al., arXiv 2302.06675)."""
    first, second = betas
    return Direction(first, 1 - first, second, 1 - second, "sign")


def liona(beta: float, nesterov: bool, correction: BiasCorrection, step: int) -> Direction:
    """Lion's sign with one β, scaled to the size of AdamW's later updates."""
    factor = 1 / (1 - beta**step) if correction == "adam" else 1.0
    moment, gradient = beta * factor, (1 - beta) * factor  # of m_t
    if nesterov:
        moment, gradient = beta * moment, beta * gradient + 1 - beta
    return Direction(moment, gradient, beta, 1 - beta, "sign", average_rms(beta))


def check_correction(given: str) -> None:
    """Raises ConfigError for a bias correction that does not exist."""
    if given not in get_args(BiasCorrection):
        raise ConfigError(f"bias_correction is {given!r}; choose one of {', '.join(get_args(BiasCorrection))}.")
