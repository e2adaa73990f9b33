"""Plain two-layer feed-forward of the first Transformers (Vaswani et al. 2017).

    y = W_out act(W_in x + b_in) + b_out

Shapes: b batch · t tokens · d width · f hidden width, 4 × width where none is given.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.activation import ACTIVATIONS, Activation
from torchstone.nn.context import BuildContext
from torchstone.nn.feedforward.config import DenseFeedForwardConfig
from torchstone.nn.project import layer_flops, matrices, roles
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span


class MLP(nn.Module):
    """See the module's docstring."""

    def __init__(self, context: BuildContext, hidden: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.w_in = context.linear(context.width, hidden, "feedforward", bias)
        self.w_out = context.linear(hidden, context.width, "feedforward", bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_btd: Tensor, span: Span) -> Tensor:
        """[b, t, width] → [b, t, width]."""
        y_btd: Tensor = self.w_out(self.activation(self.w_in(x_btd)))
        return y_btd

    def flops(self) -> float:
        """Forward FLOPs per token of both products."""
        return layer_flops(self.w_in) + layer_flops(self.w_out)

    def parameter_roles(self) -> Roles:
        """Both are feed-forward weights."""
        return roles(self, {"w_in": "mlp", "w_out": "mlp"})

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return matrices(self, "w_out")


class MLPConfig(DenseFeedForwardConfig):
    """`feedforward: mlp`."""

    kind: Literal["mlp"] = "mlp"
    hidden: int | None = Field(default=None, gt=0, description="hidden width; null: 4 × width")
    activation: Activation = Field(default="gelu", description="between the two layers")
    bias: bool = Field(default=False, description="biases of both layers")

    def width_of(self, width: int) -> int:
        """The hidden width in a model of this width."""
        return 4 * width if self.hidden is None else self.hidden

    def build(self, context: BuildContext) -> MLP:
        """The module."""
        return MLP(context, self.width_of(context.width), self.activation, self.bias)
