"""SwiGLU: the gated feed-forward layer with silu (Shazeer, arXiv 2002.05202).

    y = W_down( silu(W_gate x) ⊙ W_up x )

`hidden: null` takes 8/3 of the width, rounded up to `multiple_of`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from torchstone.nn.context import BuildContext
from torchstone.nn.feedforward.config import DenseFeedForwardConfig
from torchstone.nn.feedforward.gated import GatedFeedForward, two_thirds


class SwiGLUConfig(DenseFeedForwardConfig):
    """`feedforward: swiglu`."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: int | None = Field(default=None, gt=0, description="hidden width; null: 8/3 of the width, rounded up")
    multiple_of: int = Field(default=8, gt=0, description="what a width chosen by null is rounded up to")

    def width_of(self, width: int) -> int:
        """The hidden width in a model of this width."""
        return two_thirds(width, self.multiple_of) if self.hidden is None else self.hidden

    def build(self, context: BuildContext) -> GatedFeedForward:
        """The module."""
        return GatedFeedForward(context, self.width_of(context.width), "silu")
