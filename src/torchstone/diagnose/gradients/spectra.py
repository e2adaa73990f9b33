"""Singular values of a weight gradient from the factors that it is the product of, without the gradient itself.

A linear layer y = W x that saw t tokens has the gradient

    G = Δᵀ X = Σ_t δ_t x_tᵀ,    X: inputs [t, i],    Δ: gradients of the outputs [t, o],    rank(G) ≤ t.

With thin decompositions Xᵀ = Q_x R_x and Δᵀ = Q_δ R_δ it is G = Q_δ (R_δ R_xᵀ) Q_xᵀ, so that G and the small matrix
R_δ R_xᵀ [t, t] have the same singular values; the other min(o, i) − t are zero. That costs O((o + i) t² + t³) in place of
O(o i min(o, i)): neither Q, nor G, nor singular vectors are made. Where t ≥ min(o, i) the product itself is the smaller
matrix.

Shapes: … examples · t tokens · o outputs · i inputs · n = min(o, i) singular values.

Pitfalls: everything runs in fp32 at least (fp64 for fp64 factors), because QR and SVD in bf16 have two digits. Rows of
padding may stay, as long as their Δ is zero. Zero singular values come out as rounding noise of about 1e-7 σ₁; only those
beyond rank t are exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.diagnose.spectra import effective_rank, frobenius_norm, nuclear_norm, spectral_norm

SPECTRAL = ("nuclear", "sigma1", "sigma_min", "ratio", "frobenius", "effective_rank")
ENTRIES = ("mean", "max", "min")
STATS = (*SPECTRAL, *ENTRIES)
SCALE_FREE = ("ratio", "effective_rank")
GRAM_TOKENS = 64  # up to here Gram matrices in fp64 are faster than QR in fp32 (measured at 512 channels on a CPU)
BLOCK_NUMBERS = 1 << 24  # numbers of gradients that exist at once: 64 MB in fp32


@dataclass(frozen=True, eq=False)
class Factors:
    """One matrix's gradient in factored form, for a batch of examples: G = Δᵀ X of each.

    Attributes:
        x_bti: inputs of the layer.
        delta_bto: gradients of the loss with respect to its outputs.
    """

    x_bti: Tensor
    delta_bto: Tensor

    def fine(self) -> Factors:
        """The same in fp32, or in fp64 where one of them has it."""
        wanted = torch.promote_types(torch.promote_types(self.x_bti.dtype, self.delta_bto.dtype), torch.float32)
        return Factors(self.x_bti.to(wanted), self.delta_bto.to(wanted))

    def statistics(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The named statistics (of `STATS`), fp64 [b] each; NaN for examples whose factors are not finite."""
        fine = self.fine()
        finite_b = fine.x_bti.isfinite().all(-1).all(-1) & fine.delta_bto.isfinite().all(-1).all(-1)
        keep_b11 = finite_b[:, None, None]
        clean = Factors(torch.where(keep_b11, fine.x_bti, 0.0), torch.where(keep_b11, fine.delta_bto, 0.0))
        found: dict[str, Tensor] = {}
        if any(name in SPECTRAL for name in names):
            found |= spectral_statistics(gradient_singular_values(clean.x_bti, clean.delta_bto))
        if any(name in ENTRIES for name in names):
            found |= entry_statistics(clean.x_bti, clean.delta_bto)
        return {name: torch.where(finite_b, found[name], torch.nan) for name in names}


def gradient_singular_values(x_ti: Tensor, delta_to: Tensor) -> Tensor:
    """Singular values of Δᵀ X, largest first, [… , min(o, i)], in the type of the factors (at least fp32).

    Args:
        x_ti: inputs [..., t, i].
        delta_to: output gradients [..., t, o].
    """
    fine = Factors(x_ti, delta_to).fine()
    x_ti, delta_to = fine.x_bti, fine.delta_bto
    tokens, wanted = x_ti.shape[-2], min(x_ti.shape[-1], delta_to.shape[-1])
    if tokens >= wanted:
        return _values_of_products(x_ti, delta_to)
    values = _values_through_grams(x_ti, delta_to) if tokens <= GRAM_TOKENS and x_ti.dtype == torch.float32 else None
    if values is None:
        values = _values_through_qr(x_ti, delta_to)
    return torch.nn.functional.pad(values, (0, wanted - tokens))


def _values_through_qr(x_ti: Tensor, delta_to: Tensor) -> Tensor:
    """The t singular values of R_δ R_xᵀ; see the module's docstring."""
    core_tt = torch.linalg.qr(delta_to.mT, mode="r").R @ torch.linalg.qr(x_ti.mT, mode="r").R.mT
    if core_tt.dtype == torch.float64:
        return torch.linalg.svdvals(core_tt)
    core_tt = core_tt.double()
    return _roots(core_tt @ core_tt.mT, x_ti.dtype)


def _values_through_grams(x_ti: Tensor, delta_to: Tensor) -> Tensor | None:
    """The same as roots of eigenvalues of Lᵀ (ΔΔᵀ) L with L Lᵀ = X Xᵀ, in fp64; None where X Xᵀ is singular to fp64, as with
    equal inputs. Faster than two decompositions of few rows."""
    x_ti, delta_to, given = x_ti.double(), delta_to.double(), x_ti.dtype
    lower_tt, failed = torch.linalg.cholesky_ex(x_ti @ x_ti.mT)
    if bool(failed.any()):
        return None
    return _roots(lower_tt.mT @ (delta_to @ delta_to.mT) @ lower_tt, given)


def _roots(squares_tt: Tensor, dtype: torch.dtype) -> Tensor:
    """Roots of the eigenvalues of an fp64 matrix, largest first.

    Squares cost half of fp64's sixteen digits, which leaves errors of 1e-8 σ₁; an fp32 SVD has 1e-7 σ₁ and is slower.
    """
    return torch.linalg.eigvalsh(squares_tt).clamp(min=0).sqrt().flip(-1).to(dtype)


def _values_of_products(x_ti: Tensor, delta_to: Tensor) -> Tensor:
    """The same through the products themselves, a bounded number of them at a time."""
    inputs, outputs = x_ti.shape[-1], delta_to.shape[-1]
    if x_ti.dim() == 2:
        return torch.linalg.svdvals(delta_to.mT @ x_ti)
    x_bti, delta_bto = x_ti.flatten(0, -3), delta_to.flatten(0, -3)
    size = max(1, BLOCK_NUMBERS // (inputs * outputs))
    pieces = zip(x_bti.split(size), delta_bto.split(size), strict=True)
    values = torch.cat([torch.linalg.svdvals(d_bto.mT @ x_bti) for x_bti, d_bto in pieces])
    return values.unflatten(0, x_ti.shape[:-2])


def spectral_statistics(values_n: Tensor) -> dict[str, Tensor]:
    """The statistics of `SPECTRAL`, fp64 […], of singular values […, n]; ratio and effective rank of a zero matrix are 0.

    nuclear Σσ · sigma1 and sigma_min the largest and smallest σ · ratio σ₁/Σσ · frobenius √Σσ² · effective_rank the
    exponential of the entropy of σ/Σσ.
    """
    nuclear, largest = nuclear_norm(values_n), spectral_norm(values_n)
    return {
        "nuclear": nuclear,
        "sigma1": largest,
        "sigma_min": values_n.double().amin(-1),
        "ratio": largest / torch.where(nuclear > 0, nuclear, 1.0),
        "frobenius": frobenius_norm(values_n),
        "effective_rank": effective_rank(values_n),
    }


def entry_statistics(x_bti: Tensor, delta_bto: Tensor) -> dict[str, Tensor]:
    """Mean, largest and smallest entry of every Δᵀ X, fp64 [b] each.

    The mean follows from sums over the factors; for the extremes the entries are made in blocks of output rows and dropped.
    """
    batch, outputs, inputs = x_bti.shape[0], delta_bto.shape[-1], x_bti.shape[-1]
    total_b = (x_bti.double().sum(-1) * delta_bto.double().sum(-1)).sum(-1)
    high_b = x_bti.new_full((batch,), -torch.inf, dtype=torch.float64)
    low_b = -high_b
    for block_bto in delta_bto.split(max(1, BLOCK_NUMBERS // (batch * inputs)), dim=-1):
        entries_boi = (block_bto.mT @ x_bti).double().flatten(1)
        high_b, low_b = torch.maximum(high_b, entries_boi.amax(-1)), torch.minimum(low_b, entries_boi.amin(-1))
    return {"mean": total_b / (outputs * inputs), "max": high_b, "min": low_b}
