"""Gradient descent on two factors with L2 regularisation, where everything is known beforehand.

    minimise  ½‖A Bᵀ − D‖² + (λ/2)(‖A‖² + ‖B‖²)       D diagonal
    G = A Bᵀ − D;   A ← A − η (G B + λ A),  B ← B − η (Gᵀ A + λ B)     both at once

The closed form (arXiv 2410.23819; the paper's caption leaves out the ½, which reproduces its thresholds): singular values end at
max(d_i − λ, 0), and the imbalance ‖AᵀA − BᵀB‖ decays as e^(−2ηλ) per step, whatever the loss is.

Shapes: … any leading dimensions (starts, values of λ) · n, m sizes of D · r columns of the factors · k recorded steps. fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIAGONAL = (0.2, 0.4, 0.6, 0.8, 1.0)
RATE, STEPS, START_STD = 0.1, 1000, 0.3
SLOW = 0.02  # modes with |d − λ| below this have not arrived after STEPS


@dataclass(frozen=True, eq=False)
class Descent:
    """What was recorded at each of k steps, [k, …] each.

    Attributes:
        nuclear: ‖ABᵀ‖_*. half_frobenius: ½(‖A‖² + ‖B‖²). imbalance: ‖AᵀA − BᵀB‖_F. loss: ½‖ABᵀ − D‖².
        values: singular values of ABᵀ, [k, …, min(n, m)].
    """

    nuclear: Tensor
    half_frobenius: Tensor
    imbalance: Tensor
    loss: Tensor
    values: Tensor


def factor_descent(
    a_nr: Tensor, b_mr: Tensor, target_nm: Tensor, *, rate: float, decay: float | Tensor, record: Sequence[int]
) -> Descent:
    """Descend from the given factors.

    Args:
        a_nr, b_mr: […, n, r] and […, m, r].
        target_nm: D.
        rate: η.
        decay: λ, a number or a tensor that broadcasts to […].
        record: steps to record, rising; 0 is the start.
    """
    a_nr, b_mr, target_nm = a_nr.double(), b_mr.double(), target_nm.double()
    strength = torch.as_tensor(decay, dtype=torch.float64)[..., None, None]
    shape = torch.broadcast_shapes(strength.shape, a_nr.shape[:-2] + (1, 1))[:-2]
    a_nr, b_mr = (factor.expand(*shape, *factor.shape[-2:]) for factor in (a_nr, b_mr))
    found = []
    for step in range(max(record) + 1):
        error_nm = a_nr @ b_mr.mT - target_nm
        if step in record:
            found.append(_state(a_nr, b_mr, error_nm))
        a_nr, b_mr = (
            a_nr - rate * (error_nm @ b_mr + strength * a_nr),
            b_mr - rate * (error_nm.mT @ a_nr + strength * b_mr),
        )
    return Descent(*(torch.stack(column) for column in zip(*found, strict=True)))


def _state(a_nr: Tensor, b_mr: Tensor, error_nm: Tensor) -> tuple[Tensor, ...]:
    values_n = torch.linalg.svdvals(a_nr @ b_mr.mT)
    half = 0.5 * (a_nr.square().sum((-2, -1)) + b_mr.square().sum((-2, -1)))
    imbalance = torch.linalg.matrix_norm(a_nr.mT @ a_nr - b_mr.mT @ b_mr)
    return values_n.sum(-1), half, imbalance, 0.5 * error_nm.square().sum((-2, -1)), values_n


def random_starts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors [count, 5, 5] from N(0, 0.3²)."""
    generator = torch.Generator().manual_seed(seed)
    size = len(DIAGONAL)
    a, b = START_STD * torch.randn(2, count, size, size, generator=generator, dtype=torch.float64)
    return a, b


def soft_threshold(decay: float) -> Tensor:
    """Where the singular values end: max(d_i − λ, 0), largest first."""
    return (torch.tensor(sorted(DIAGONAL, reverse=True), dtype=torch.float64) - decay).clamp_min(0)
