"""SwiGLU: a gated feed-forward layer (Shazeer, arXiv 2002.05202).

    y = W_down( silu(W_gate x) ⊙ W_up x )

Shapes: b batch · t tokens · d width · f hidden width. `hidden: null` takes 8/3 of the width, rounded up to
`multiple_of`, which has about the parameters of a plain layer of 4 × width.
"""

from __future__ import annotations

from math import ceil
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.project import project
from torchstone.nn.roles import Roles
from torchstone.recipe.part import Part


class SwiGLU(nn.Module):
    """Gated feed-forward layer without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(width, hidden, bias=False)
        self.w_up = nn.Linear(width, hidden, bias=False)
        self.w_down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """[b, t, width] → [b, t, width]."""
        gate_btf, up_btf = project(x_btd, self.w_gate.weight, self.w_up.weight)
        return self.w_down(F.silu(gate_btf) * up_btf)

    def flops(self) -> float:
        """Forward FLOPs per token of the three products."""
        return sum(2 * weight.numel() for weight in self.parameters())

    def parameter_roles(self) -> Roles:
        """All three are feed-forward weights."""
        return {"w_gate.weight": "mlp", "w_up.weight": "mlp", "w_down.weight": "mlp"}

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return ("w_down.weight",)


class SwiGLUConfig(Part):
    """`feedforward: swiglu`."""

    family: ClassVar[str] = "feedforward"
    kind: Literal["swiglu"] = "swiglu"
    hidden: int | None = Field(default=None, gt=0, description="hidden width; null: 8/3 of the width, rounded up")
    multiple_of: int = Field(default=8, gt=0, description="what a width chosen by null is rounded up to")

    def width_of(self, width: int) -> int:
        """The hidden width in a model of this width."""
        if self.hidden is not None:
            return self.hidden
        return ceil(8 * width / (3 * self.multiple_of)) * self.multiple_of

    def build(self, context: BuildContext) -> SwiGLU:
        """The module."""
        return SwiGLU(context.width, self.width_of(context.width))
