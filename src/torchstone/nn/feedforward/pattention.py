"""One Pattention in place of the two layers of an MLP (TokenFormer, arXiv 2410.23168).

    y = Θ(x Kᵀ) V        K, V [n, d], Θ as in `nn.projection.pattention`

An MLP of hidden size n is the same with Θ = activation, so the two have equal parameters and FLOPs at equal n. The paper takes
n = 4 d.

Shapes: b batch · t tokens · d width · n parameter tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.project import roles
from torchstone.nn.projection.pattention import Pattention, PattentionSettings, released_value_std
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span


class PattentionFeedForward(nn.Module):
    """A feed-forward layer of parameter tokens."""

    def __init__(self, memory: Pattention) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x_btd: Tensor, span: Span) -> Tensor:
        """[b, t, width] → [b, t, width]."""
        y_btd: Tensor = self.memory(x_btd)
        return y_btd

    def flops(self) -> float:
        """Forward FLOPs per token of the two products."""
        return self.memory.flops()

    def parameter_roles(self) -> Roles:
        """Keys and values are feed-forward weights."""
        return roles(self, {"memory": "mlp"})


class PattentionFeedForwardConfig(PattentionSettings):
    """`feedforward: pattention`."""

    family: ClassVar[str] = "feedforward"
    kind: Literal["pattention"] = "pattention"
    size_field: ClassVar[str] = "tokens"
    tokens: int | None = Field(default=None, gt=0, description="parameter tokens; null: 4 times the model's width")
    frozen_tokens: int = Field(default=0, ge=0, description="first tokens, not trained")

    def width_of(self, width: int) -> int:
        """Parameter tokens in a model of this width."""
        return 4 * width if self.tokens is None else self.tokens

    def build(self, context: BuildContext) -> PattentionFeedForward:
        """The module."""
        width, tokens = context.width, self.width_of(context.width)
        std = released_value_std(context)
        return PattentionFeedForward(Pattention(self, width, width, tokens, self.frozen_tokens, std, "feedforward"))
