"""Ranks and norms of a matrix from its singular values.

Rank is a question of degree once no singular value is exactly zero. With s_1 ≥ … ≥ s_n and p = s / Σs:

    pseudo-rank(f)   least r with s_1 + … + s_r ≥ f · Σs              energy rank: the same with s²
    stable rank      Σs² / s_1²                                       how many directions as strong as the strongest
    effective rank   exp(−Σ p ln p)                                   Roy and Vetterli, EUSIPCO 2007
    participation    (Σs²)² / Σs⁴                                     as used for covariance spectra
    numeric rank     number of s > s_1 · n · 1.19e-7                  what fp32 can tell from zero
    norms            nuclear Σs, Frobenius √Σs², spectral s_1

Every rank is 0 for the zero matrix, between 1 and n otherwise, and does not change when the matrix is scaled.

Shapes: … any leading dimensions (layers, heads) · n singular values of each matrix, in any order. Results are fp64 […].

Pitfall: pseudo-rank, as in arXiv 2410.23819, depends on f and on many small values together; look at the effective rank as
well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.errors import ConfigError

SHARE = 0.95
RANKS = ("pseudo_rank", "energy_rank", "stable_rank", "effective_rank", "participation", "numeric_rank")
NORMS = ("nuclear", "frobenius", "spectral")


def spectral_metrics(values_n: Tensor, f: float = SHARE) -> dict[str, Tensor]:
    """Every norm and rank by name (`NORMS`, then `RANKS`), fp64 […], of singular values […, n]; see `pseudo_rank` for f."""
    return {
        "nuclear": nuclear_norm(values_n),
        "frobenius": frobenius_norm(values_n),
        "spectral": spectral_norm(values_n),
        "pseudo_rank": pseudo_rank(values_n, f),
        "energy_rank": energy_rank(values_n, f),
        "stable_rank": stable_rank(values_n),
        "effective_rank": effective_rank(values_n),
        "participation": participation(values_n),
        "numeric_rank": numeric_rank(values_n),
    }


def nuclear_norm(values_n: Tensor) -> Tensor:
    """Σs."""
    return values_n.double().sum(-1)


def frobenius_norm(values_n: Tensor) -> Tensor:
    """√Σs²."""
    return spectral_norm(values_n) * stable_rank(values_n).sqrt()


def spectral_norm(values_n: Tensor) -> Tensor:
    """s_1."""
    return values_n.double().amax(-1)


def pseudo_rank(values_n: Tensor, f: float = SHARE) -> Tensor:
    """Number of largest singular values that together are at least the share `f` of their sum.

    Raises:
        ConfigError: f is not above 0 and at most 1.
    """
    return _values_for(_relative(values_n), f)


def energy_rank(values_n: Tensor, f: float = SHARE) -> Tensor:
    """The same with squares: how many values hold the share `f` of Σs². Raises ConfigError (see `pseudo_rank`)."""
    return _values_for(_relative(values_n).square(), f)


def stable_rank(values_n: Tensor) -> Tensor:
    """Σs² / s_1²."""
    return _relative(values_n).square().sum(-1)


def effective_rank(values_n: Tensor) -> Tensor:
    """exp of the entropy of s / Σs."""
    share_n = _share(values_n)
    return torch.where(share_n.sum(-1) > 0, torch.special.entr(share_n).sum(-1).exp(), 0.0)


def participation(values_n: Tensor) -> Tensor:
    """(Σs²)² / Σs⁴."""
    squares_n = _relative(values_n).square()
    fourth = squares_n.square().sum(-1)
    return squares_n.sum(-1).square() / torch.where(fourth > 0, fourth, 1.0)


def numeric_rank(values_n: Tensor) -> Tensor:
    """Number of singular values above s_1 · n · (rounding unit of fp32)."""
    threshold = values_n.shape[-1] * torch.finfo(torch.float32).eps
    return (_relative(values_n) > threshold).sum(-1).double()


def _relative(values_n: Tensor) -> Tensor:
    """s / s_1 in fp64, so that no square under- or overflows; zeros where all are zero."""
    largest = values_n.double().amax(-1, keepdim=True)
    return values_n.double() / torch.where(largest > 0, largest, 1.0)


def _share(values_n: Tensor) -> Tensor:
    """s / Σs in fp64; zeros where all are zero."""
    relative_n = _relative(values_n)
    total = relative_n.sum(-1, keepdim=True)
    return relative_n / torch.where(total > 0, total, 1.0)


def _values_for(amounts_n: Tensor, f: float) -> Tensor:
    """How many of the largest amounts reach the share `f` of all."""
    if not 0 < f <= 1:
        raise ConfigError(f"the share f of a pseudo-rank is above 0 and at most 1, and {f:g} was given; 0.95 is usual.")
    sums_n = amounts_n.sort(-1, descending=True).values.cumsum(-1)
    total = sums_n[..., -1:]
    return torch.where(total[..., 0] > 0, (sums_n < f * total).sum(-1) + 1, 0).double()
