"""Singular values and balance of the two matrix products through which attention weights act.

    QK_h = W_k[g]ᵀ W_q[h]  (logits)      OV_h = W_o[h] W_v[g]  (values),   g the key-value head of query head h

Both are A_gᵀ B_h, or its transpose, of factors [d, w] with w much larger than d; their rank is at most d. With A_gᵀ = Q_a R_a
and B_hᵀ = Q_b R_b the singular values are those of the small R_a R_bᵀ, exactly: O(w d²) instead of O(w³). Rotary positions put
a rotation R^δ between the factors, which then stands between the small matrices: R_a R^δ R_bᵀ.

Balance (arXiv 2410.23819). L2 regularisation of two factors is, where they are balanced (A Aᵀ = B Bᵀ), the nuclear norm of their
product:  ½(‖A‖² + ‖B‖²) ≥ ‖AᵀB‖_*. A factor that several heads share is balanced against all of them together, so the balance
is that of A_g and the stack of its B_h.

Shapes: h heads · g shared factors · d channels of a head · w width · n = min(d, w) singular values · c offsets δ. All fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.diagnose.spectra import nuclear_norm


@dataclass(frozen=True, eq=False)
class Balance:
    """Balance of each shared factor with the stack of its heads' factors, [g] each.

    Attributes:
        half_frobenius: ½(‖A_g‖² + Σ_h ‖B_h‖²).
        nuclear: nuclear norm of A_gᵀ [B_h …].
        imbalance: ‖A_g A_gᵀ − Σ_h B_h B_hᵀ‖_F.
    """

    half_frobenius: Tensor
    nuclear: Tensor
    imbalance: Tensor

    @property
    def ratio(self) -> Tensor:
        """half_frobenius / nuclear: 1 in the low-rank regime of weight decay, above 1 elsewhere; inf for a zero product."""
        return self.half_frobenius / self.nuclear


class HeadProducts:
    """The products A_gᵀ B_h of one layer.

    Args:
        shared_gdw: A, such as W_k or W_v by key-value head.
        own_hdw: B, such as W_q by head, or W_o by head and transposed.
        shared_of: the index g of every head; None spreads the heads evenly, in order.
    """

    def __init__(self, shared_gdw: Tensor, own_hdw: Tensor, shared_of: Sequence[int] | None = None) -> None:
        self.shared_of = _indices(shared_gdw, own_hdw, shared_of)
        self.shared_gdw, self.own_hdw = shared_gdw.double(), own_hdw.double()
        self.shared_r_gnd = torch.linalg.qr(self.shared_gdw.mT, mode="r")[1]
        self.own_r_hnd = torch.linalg.qr(self.own_hdw.mT, mode="r")[1]

    def core(self, offset: float = 0.0, frequencies_m: Tensor | None = None) -> Tensor:
        """R_a R^δ R_bᵀ [h, n, n], whose singular values are the product's.

        Args:
            offset: δ, query position minus key position.
            frequencies_m: radians per token of every channel pair, in half order (pair m is channels m and m + d/2).
        """
        own_hdn = self.own_r_hnd.mT
        if frequencies_m is not None and offset:
            own_hdn = rotate(own_hdn, offset, frequencies_m)
        return self.shared_r_gnd[self.shared_of] @ own_hdn

    def singular_values(self, offset: float = 0.0, frequencies_m: Tensor | None = None) -> Tensor:
        """Of every head's product, [h, n], largest first; see `core`."""
        return torch.linalg.svdvals(self.core(offset, frequencies_m))

    def truncated_own(self, rank: int) -> Tensor:
        """Factors B' [h, d, w] for which every A_gᵀ B'_h is the nearest matrix to A_gᵀ B_h of at most this rank."""
        q_hwn, r_hnd = torch.linalg.qr(self.own_hdw.mT)
        core_hnn = self.shared_r_gnd[self.shared_of] @ r_hnd.mT
        right_hrn = torch.linalg.svd(core_hnn)[2][:, :rank]
        return r_hnd.mT @ right_hrn.mT @ right_hrn @ q_hwn.mT


def balance(shared_gdw: Tensor, own_hdw: Tensor, shared_of: Sequence[int] | None = None) -> Balance:
    """Balance of each shared factor with the stack of its heads' factors; arguments as of `HeadProducts`.

    Only the d × d matrices A Aᵀ and B Bᵀ are needed: the squared singular values of Aᵀ B are the eigenvalues of their product.
    The root makes rounding of zeros as large as 1e-8 of the largest singular value each, which norms do not notice.
    """
    shared_gdd = shared_gdw.double() @ shared_gdw.double().mT
    own_hdd = own_hdw.double() @ own_hdw.double().mT
    groups = _indices(shared_gdw, own_hdw, shared_of)
    stacked_gdd = torch.zeros_like(shared_gdd).index_add(0, groups, own_hdd)
    values_gd, vectors_gdd = torch.linalg.eigh(shared_gdd)
    half_gdd = vectors_gdd * values_gd.clamp_min(0).sqrt().unsqueeze(-2)
    squares_gd = torch.linalg.eigvalsh(half_gdd.mT @ stacked_gdd @ half_gdd)
    trace_g = (stacked_gdd + shared_gdd).diagonal(dim1=-2, dim2=-1).sum(-1)
    return Balance(
        half_frobenius=0.5 * trace_g,
        nuclear=nuclear_norm(squares_gd.clamp_min(0).sqrt()),
        imbalance=torch.linalg.matrix_norm(shared_gdd - stacked_gdd),
    )


def _indices(shared_gdw: Tensor, own_hdw: Tensor, shared_of: Sequence[int] | None) -> Tensor:
    """The shared factor of every head."""
    heads, groups = own_hdw.shape[0], shared_gdw.shape[0]
    given = [head * groups // heads for head in range(heads)] if shared_of is None else list(shared_of)
    return torch.tensor(given, device=own_hdw.device)


def rotate(rows_hdx: Tensor, offset: float, frequencies_m: Tensor) -> Tensor:
    """R^δ of matrices […, d, x] whose rows are channels in half order."""
    angle_m1 = (offset * frequencies_m.to(rows_hdx)).unsqueeze(-1)
    first_hmx, second_hmx = rows_hdx.chunk(2, dim=-2)
    cos_m1, sin_m1 = angle_m1.cos(), angle_m1.sin()
    turned = first_hmx * cos_m1 - second_hmx * sin_m1, second_hmx * cos_m1 + first_hmx * sin_m1
    return torch.cat(turned, dim=-2)
