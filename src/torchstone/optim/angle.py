"""How far a step turns the weights: target angles of rotational updates, and the sizes of Lion's and AdamW's updates.

Weight decay and the update balance each other after a while: the norm of a row then stays what it is, and every step turns it by
about the same angle (Kosson et al., arXiv 2305.17212). A rotational update takes that angle from the first step on. With the
learning rate η and the decay λ:

    AdamW   θ = √(2ηλ) · γ(β1)                                        γ(β) = √((1−β)/(1+β))
    Lion    θ = √(π/2) · √(2ηλ) · √((1−β1)² + β1² (1−β2)/(1+β2))
    SGDM    θ = √(2ηλ/(1+μ))
    LionAR  θ = √(2ηλ) · γ, the angle of the AdamW whose updates it copies in size (arXiv 2410.23922)

γ(β) is the root mean square of an average of independent unit values with weights (1−β) β^k, hence the size of AdamW's update
once gradients are uncorrelated, 0.229 at β1 = 0.9. Its first update with bias correction has size 1, 1/γ = 4.4 times that.

A strict rotational step adds a vector of length θN at a right angle to a row of length N and rescales the row, so that the row
turns by arctan θ.

Pitfall: θ is in radians per step and follows √η. Where a warmup of η is meant to be a warmup of the angle, the angle's schedule
must be linear: θ(η) = θ(η_peak) · η / η_peak.
"""

from __future__ import annotations

import math
from typing import Literal

AngleSchedule = Literal["sqrt", "linear"]


def average_rms(beta: float) -> float:
    """γ = √((1−β)/(1+β)): root mean square of an exponential average of independent values of mean 0 and variance 1."""
    return math.sqrt((1 - beta) / (1 + beta))


def lion_rms(betas: tuple[float, float]) -> float:
    """The same of Lion's mixture β1 m + (1−β1) g, m being an average with β2; γ(β) where both are β."""
    first, second = betas
    return math.sqrt((1 - first) ** 2 + first**2 * (1 - second) / (1 + second))


def adamw_overshoot(beta1: float) -> float:
    """How many times longer AdamW's first update is than later ones of uncorrelated gradients: 1/γ."""
    return 1 / average_rms(beta1)


def adamw_angle(lr: float, weight_decay: float, beta1: float) -> float:
    """Radians per step of AdamW in equilibrium."""
    return math.sqrt(2 * lr * weight_decay) * average_rms(beta1)


def lionar_angle(lr: float, weight_decay: float, gamma: float) -> float:
    """Radians per step of LionAR, γ being the size of its inner updates."""
    return math.sqrt(2 * lr * weight_decay) * gamma


def lion_angle(lr: float, weight_decay: float, betas: tuple[float, float]) -> float:
    """Radians per step of Lion in equilibrium."""
    return math.sqrt(math.pi / 2) * math.sqrt(2 * lr * weight_decay) * lion_rms(betas)


def sgdm_angle(lr: float, weight_decay: float, momentum: float) -> float:
    """Radians per step of SGD with momentum in equilibrium."""
    return math.sqrt(2 * lr * weight_decay / (1 + momentum))


def rotation(theta: float) -> float:
    """The angle by which a strict step of target angle θ turns a row: arctan θ."""
    return math.atan(theta)
