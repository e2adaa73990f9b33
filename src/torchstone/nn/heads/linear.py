"""Linear output head: logits = W h, with W of its own or the token embedding's (tied; Press and Wolf 2017).

Shapes: b batch · t tokens · d width · v vocabulary. Losses that never hold all logits use `weight_vd` directly.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.heads.base import Features, TiedOrOwn
from torchstone.recipe.part import Part


class LinearHead(TiedOrOwn):
    """One matrix."""

    def __init__(self, width: int, embedding: nn.Embedding, tied: bool, soft_cap: float | None = None) -> None:
        super().__init__(width, embedding, tied)
        self.soft_cap = soft_cap

    def features(self, hidden: Tensor) -> Features:
        """The hidden states themselves."""
        return Features(hidden)

    def full_matrix(self) -> Tensor | None:
        """W, or None under a soft cap."""
        return self.weight_vd if self.soft_cap is None else None

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2 * self.weight_vd.numel()


class LinearHeadConfig(Part):
    """`head: linear`."""

    family: ClassVar[str] = "head"
    kind: Literal["linear"] = "linear"
    tied: bool = Field(default=True, description="true: the output matrix is the token embedding")
    soft_cap: float | None = Field(
        default=None, gt=0, description="c of c·tanh(logits / c), which bounds logits; null: none"
    )

    def build(self, context: BuildContext, embedding: nn.Embedding) -> LinearHead:
        """The head; a tied one reads the embedding's weight."""
        return LinearHead(context.width, embedding, self.tied, self.soft_cap)
