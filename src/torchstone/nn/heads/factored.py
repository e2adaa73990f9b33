"""Output head of bounded rank: logits = A (B h), A [v, r] and B [r, d] in place of one matrix [v, d].

Godey et al. (arXiv 2404.07647) constrain heads so to measure how much rank the next-token distribution needs. With
r = min(v, d) the head can express every linear head. It holds r·(v + d) values, fewer than v·d where r < v·d / (v + d).

Both factors start with standard deviation 1/√fan-in, or as the truncated singular value decomposition of a trained
matrix (`from_truncated_svd`), which shares the singular values between them: optimisation is badly scaled if one factor
alone carries the norm.

Pitfall: there is no tied form, since no factor has the shape of the embedding.

Shapes: … any leading sizes · d width · r rank · v vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.nn.context import BuildContext
from torchstone.nn.heads.base import Features, Head
from torchstone.nn.initialisation import Fill
from torchstone.recipe.part import Part


class FactoredHead(Head):
    """Two matrices.

    Args:
        width, vocab_size, rank: sizes; rank at most min(vocab_size, width).
        std: standard deviation of both factors' initial values; None for 1/√fan-in of each.
        soft_cap: bound of the logits, or None.

    Raises:
        ConfigError: the rank exceeds what a matrix of this shape can have.
    """

    tied = False

    def __init__(
        self, width: int, vocab_size: int, rank: int, std: float | None = None, soft_cap: float | None = None
    ) -> None:
        super().__init__()
        check_rank(rank, vocab_size, width)
        self.rank, self.std, self.soft_cap = rank, std, soft_cap
        self.a_vr = nn.Parameter(torch.empty(vocab_size, rank))
        self.b_rd = nn.Parameter(torch.empty(rank, width))

    def own_initialisation(self) -> dict[str, Fill]:
        """Both factors by fan-in: r for A, d for B."""
        return {
            name: partial(_normal, std=factor.shape[1] ** -0.5 if self.std is None else self.std)
            for name, factor in (("a_vr", self.a_vr), ("b_rd", self.b_rd))
        }

    @property
    def weight_vd(self) -> Tensor:
        """A [v, r], which multiplies the features."""
        return self.a_vr

    def features(self, hidden: Tensor) -> Features:
        """B h […, r]."""
        return Features(nn.functional.linear(hidden, self.b_rd))

    def full_matrix(self) -> Tensor | None:
        """A B [v, d], or None under a soft cap."""
        return self.a_vr @ self.b_rd if self.soft_cap is None else None

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2 * (self.a_vr.numel() + self.b_rd.numel())


def check_rank(rank: int, vocab_size: int, width: int) -> None:
    """Raises ConfigError for a rank that no matrix [vocab_size, width] has."""
    if not 1 <= rank <= min(vocab_size, width):
        what = f"exceeds min(vocab {vocab_size}, width {width})" if rank > 0 else "is not positive"
        raise ConfigError(f"rank {rank} {what}; a head's rank is between 1 and {min(vocab_size, width)}.")


def truncated_factors(weight_vd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = U_r Σ_r^½ [v, r] and B = Σ_r^½ V_rᵀ [r, d] of a matrix, fp64: the nearest matrix of this rank is A B.

    Raises:
        ConfigError: the rank exceeds min(v, d).
    """
    check_rank(rank, *weight_vd.shape)
    u_vk, sigma_k, v_kd = torch.linalg.svd(weight_vd.detach().double(), full_matrices=False)
    root_r = sigma_k[:rank].sqrt()
    return u_vk[:, :rank] * root_r, root_r[:, None] * v_kd[:rank]


def from_truncated_svd(weight_vd: Tensor, rank: int) -> FactoredHead:
    """The factored head nearest to a trained output matrix, in the matrix's type and on its device."""
    head = FactoredHead(weight_vd.shape[1], weight_vd.shape[0], rank).to(weight_vd.device, weight_vd.dtype)
    with torch.no_grad():
        for parameter, value in zip((head.a_vr, head.b_rd), truncated_factors(weight_vd, rank), strict=True):
            parameter.copy_(value)
    return head


def _normal(value: Tensor, generator: torch.Generator, std: float) -> None:
    value.normal_(0.0, std, generator=generator)


class FactoredHeadConfig(Part):
    """`head: factored`."""

    family: ClassVar[str] = "head"
    kind: Literal["factored"] = "factored"
    rank: int | None = Field(
        default=None, gt=0, description="rank of the output map; null: half the smaller of vocabulary and width"
    )
    std: float | None = Field(default=None, gt=0, description="initial values of both factors; null: 1/√fan-in")
    soft_cap: float | None = Field(
        default=None, gt=0, description="c of c·tanh(logits / c), which bounds logits; null: none"
    )

    def build(self, context: BuildContext, embedding: nn.Embedding) -> FactoredHead:
        """The head; never tied."""
        rank = self.rank or max(1, min(embedding.num_embeddings, context.width) // 2)
        return FactoredHead(context.width, embedding.num_embeddings, rank, self.std, self.soft_cap)
