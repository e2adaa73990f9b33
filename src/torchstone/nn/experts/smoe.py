"""SMoE: a feed-forward layer of experts, of which each token uses a few (JetMoE, arXiv 2404.07413, section 3.1).

    y = b + Σ_{j ≤ k} g_j W2_{e_j} (silu(a) ⊙ c),   [a; c] = W1_{e_j} x

The experts e_1 … e_k and their gates come from a linear router (`router`, `choice`); no token is dropped (`dispatch`).
Each expert is a SwiGLU of its own; the bias is shared and not gated.

Shapes: b batch · t tokens · n = b·t · d width · f hidden width of one expert · e experts · k slots · m = n·k rows.

`hidden: null` gives k experts together the default width of a SwiGLU layer, so that a token costs what it costs there.

Pitfalls: padding is routed like everything else, counts in no statistic, and has output 0. Parameters grow with the
number of experts, FLOPs with `top_k`: "as large as" and "as expensive as" are different comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.experts.dispatch import DISPATCHES, Dispatch
from torchstone.nn.experts.router import RoutedPart, Router
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span

ROUNDED_TO = 8


class SMoE(nn.Module):
    """See the module's docstring.

    Attributes:
        w_in: [e, 2f, d], the rows of a before those of c.
        w_out: [e, d, f].
    """

    def __init__(self, context: BuildContext, part: SMoEConfig) -> None:
        super().__init__()
        width, hidden = context.width, part.width_of(context.width)
        self.router = Router(context, part)
        self.top_k, self.dispatch = part.top_k, DISPATCHES[part.dispatch]
        self.w_in = nn.Parameter(torch.empty(part.num_experts, 2 * hidden, width))
        self.w_out = nn.Parameter(torch.empty(part.num_experts, width, hidden))
        self.bias = nn.Parameter(torch.empty(width)) if part.bias else None

    def forward(self, x_btd: Tensor, span: Span) -> Tensor:
        """[b, t, width] → [b, t, width]."""
        routing = self.router(x_btd, span)
        dispatch: Dispatch = self.dispatch(routing)
        a_mf, c_mf = dispatch.apply(dispatch.spread(x_btd.flatten(0, 1)), self.w_in).chunk(2, dim=-1)
        rows_md = dispatch.apply(F.silu(a_mf) * c_mf, self.w_out)
        y_btd = dispatch.combine(rows_md, routing.gates_nk).view(x_btd.shape)
        if self.bias is not None:
            y_btd = y_btd + self.bias.to(y_btd.dtype)
        return y_btd if span.valid_bt is None else y_btd.masked_fill(~span.valid_bt.unsqueeze(-1), 0.0)

    def flops(self) -> float:
        """Forward FLOPs per token: the router and the experts that a token uses."""
        return self.router.flops() + 2.0 * self.top_k * (self.w_in[0].numel() + self.w_out[0].numel())

    def inactive_parameters(self) -> int:
        """Parameters that one token does not use."""
        return (self.w_in.shape[0] - self.top_k) * (self.w_in[0].numel() + self.w_out[0].numel())

    def activation_values(self) -> int:
        """Values per token kept for the backward pass: inputs and outputs of both products of its experts."""
        return self.top_k * (sum(self.w_in.shape[1:]) + sum(self.w_out.shape[1:]))

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the router's last pass."""
        return self.router.diagnostics()

    def parameter_roles(self) -> Roles:
        """Experts are feed-forward weights."""
        return {"w_in": "mlp", "w_out": "mlp"}

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return ("w_out",)


class SMoEConfig(RoutedPart):
    """`feedforward: smoe`."""

    family: ClassVar[str] = "feedforward"
    size_field: ClassVar[str] = "hidden"
    kind: Literal["smoe"] = "smoe"
    hidden: int | None = Field(
        default=None, gt=0, description="hidden width of one expert; null: 8/3 of the width over top_k, rounded up to 8"
    )

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """A dense layer's hidden width is that of all its channels, and its bias is another one."""
        own = {"hidden", "bias"} if previous.get("kind") != "smoe" else set()
        return {key: value for key, value in super().inherit(previous).items() if key not in own}

    def width_of(self, width: int) -> int:
        """The hidden width of one expert in a model of this width."""
        if self.hidden is not None:
            return self.hidden
        return ceil(8 * width / (3 * self.top_k * ROUNDED_TO)) * ROUNDED_TO

    def build(self, context: BuildContext) -> SMoE:
        """The module."""
        return SMoE(context, self)
