"""Factors of an output matrix at every rank, from one eigendecomposition of its smaller Gram matrix.

    WᵀW = V Σ² Vᵀ        A = W V_r Σ_r^(−½),   B = Σ_r^½ V_rᵀ        A B is the nearest matrix of rank r to W

The same as the truncated singular value decomposition, and the norm is shared between both factors; but a head of 128 thousand
tokens and 4096 channels needs a 4096 × 4096 matrix in fp64 and no U of its own size, neither during the decomposition nor
afterwards. A wide W (fewer tokens than channels) is transposed.

Shapes: v vocabulary · d width · t, s the larger and the smaller of both · r rank.

Pitfall: singular values below about 1e-7 of the largest are lost in the Gram matrix; their directions get factors of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.diagnose.bottleneck.head_spectrum import ROWS_AT_ONCE, gram_matrix
from torchstone.nn.heads.factored import check_rank

FLOOR = 1e-7  # of the largest singular value


class HeadFactors:
    """Factors of one matrix.

    Args:
        weight_vd: the output matrix; it is kept, not copied.
    """

    def __init__(self, weight_vd: Tensor) -> None:
        self.weight_vd = weight_vd
        self._wide = weight_vd.shape[0] < weight_vd.shape[1]
        self._tall_ts = weight_vd.T if self._wide else weight_vd
        squares_s, vectors_ss = torch.linalg.eigh(gram_matrix(self._tall_ts))
        self._values_s, self._vectors_ss = squares_s.clamp(min=0).sqrt().flip(0), vectors_ss.flip(1)

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [v, r] and B [r, d], fp32.

        Raises:
            ConfigError: the rank exceeds min(v, d).
        """
        check_rank(rank, *self.weight_vd.shape)
        root_r, vectors_sr = self._values_s[:rank].sqrt(), self._vectors_ss[:, :rank]
        kept_r = self._values_s[:rank] > FLOOR * self._values_s[0]
        onto_sr = vectors_sr * torch.where(kept_r, 1 / root_r, 0.0)
        left_tr = torch.cat([(rows_ts.double() @ onto_sr).float() for rows_ts in self._tall_ts.split(ROWS_AT_ONCE)])
        right_rs = ((root_r * kept_r)[:, None] * vectors_sr.T).float()
        pair = (right_rs.T, left_tr.T) if self._wide else (left_tr, right_rs)
        return pair[0].contiguous(), pair[1].contiguous()
