"""No position: tokens are told apart by the causal mask alone (NoPE, Kazemnejad et al., arXiv 2305.19466)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from torchstone.nn.position.base import Position, PositionContext
from torchstone.nn.span import Span
from torchstone.recipe.part import Part


class NoPosition(Position):
    """Leaves queries and keys as they are."""

    def arrange(self, weight: Tensor) -> Tensor:
        """The weight, unchanged."""
        return weight

    def rotate(self, q_bthd: Tensor, k_btgd: Tensor, span: Span, offset: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, unchanged."""
        return q_bthd, k_btgd


class NoPositionConfig(Part):
    """`position: none`."""

    family: ClassVar[str] = "position"
    kind: Literal["none"] = "none"

    def build(self, context: PositionContext) -> NoPosition:
        """The module; the context does not matter."""
        return NoPosition()
