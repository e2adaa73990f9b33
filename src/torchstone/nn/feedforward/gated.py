"""Gated feed-forward layer (Shazeer, arXiv 2002.05202), of which SwiGLU and GeGLU are the activations silu and gelu.

    y = W_down( act(W_gate x) ⊙ W_up x )

Shapes: b batch · t tokens · d width · f hidden width.
"""

from __future__ import annotations

from math import ceil

from torch import Tensor, nn

from torchstone.nn.activation import ACTIVATIONS, Activation
from torchstone.nn.context import BuildContext
from torchstone.nn.project import layer_flops, matrices, project, roles
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span


def two_thirds(width: int, multiple_of: int) -> int:
    """8/3 of the width, rounded up: three matrices then have about the parameters of a plain layer of 4 × width."""
    return ceil(8 * width / (3 * multiple_of)) * multiple_of


class GatedFeedForward(nn.Module):
    """See the module's docstring.

    Args:
        context: of the model.
        hidden: hidden width.
        activation: of the gate.
        bias: of all three maps.
    """

    def __init__(self, context: BuildContext, hidden: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.w_gate = context.linear(context.width, hidden, "feedforward", bias)
        self.w_up = context.linear(context.width, hidden, "feedforward", bias)
        self.w_down = context.linear(hidden, context.width, "feedforward", bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_btd: Tensor, span: Span) -> Tensor:
        """[b, t, width] → [b, t, width]."""
        gate_btf, up_btf = project(x_btd, self.w_gate, self.w_up)
        y_btd: Tensor = self.w_down(self.activation(gate_btf) * up_btf)
        return y_btd

    def flops(self) -> float:
        """Forward FLOPs per token of the three products."""
        return sum(layer_flops(layer) for layer in (self.w_gate, self.w_up, self.w_down))

    def parameter_roles(self) -> Roles:
        """All three are feed-forward weights."""
        return roles(self, {"w_gate": "mlp", "w_up": "mlp", "w_down": "mlp"})

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return matrices(self, "w_down")
