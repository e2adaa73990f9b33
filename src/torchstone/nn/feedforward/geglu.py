"""GeGLU: the gated feed-forward layer with gelu (Shazeer, arXiv 2002.05202), as in Gemma and RecurrentGemma.

    y = W_down( gelu(W_gate x + b) ⊙ (W_up x + b) ) + b

Pitfall: Gemma's gelu is the tanh approximation, and `hidden` counts one branch (some code bases count both together).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from torchstone.nn.context import BuildContext
from torchstone.nn.feedforward.config import DenseFeedForwardConfig
from torchstone.nn.feedforward.gated import GatedFeedForward, two_thirds


class GeGLUConfig(DenseFeedForwardConfig):
    """`feedforward: geglu`."""

    kind: Literal["geglu"] = "geglu"
    hidden: int | None = Field(default=None, gt=0, description="hidden width; null: 8/3 of the width, rounded up")
    multiple_of: int = Field(default=8, gt=0, description="what a width chosen by null is rounded up to")
    approximate: Literal["tanh", "none"] = Field(default="tanh", description="tanh: Gemma's gelu; none: the exact one")
    bias: bool = Field(default=False, description="biases of all three maps")

    def width_of(self, width: int) -> int:
        """The hidden width in a model of this width."""
        return two_thirds(width, self.multiple_of) if self.hidden is None else self.hidden

    def build(self, context: BuildContext) -> GatedFeedForward:
        """The module."""
        activation: Literal["gelu", "gelu-tanh"] = "gelu-tanh" if self.approximate == "tanh" else "gelu"
        return GatedFeedForward(context, self.width_of(context.width), activation, self.bias)
