"""Router: a linear map from a token to one logit per expert, and the losses that keep experts in use.

The choice itself is in `choice`, the losses are in `balance`. Logits are computed in fp32 also under autocast and in
models of half precision: rounding them changes which experts a token goes to. No noise, no capacity, no dropped tokens.

Shapes: b batch · t tokens · n = b·t · d width · e experts · k slots.

Auxiliary losses leave the pass through `Span.leave`, coefficients included. `aux_reduction: sum` adds those of all
routers, as JetMoE does; `mean` divides by the number of routers of an encoder (a decoder is one, a belief-state model has
two), which a census that all of them share counts while the model is built.

Pitfall: gates that are normalised over a single kept expert are 1 whatever the router says, so that the task teaches it
nothing. `top_k: 1` therefore needs `softmax-topk` without `renormalise`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.experts.balance import Statistics, balance_loss, statistics, z_loss
from torchstone.nn.experts.choice import Order, Routing, choose
from torchstone.nn.precision import Fine
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span
from torchstone.recipe.part import Part


class RoutedPart(Part):
    """Settings that every part with experts has."""

    num_experts: int = Field(default=8, gt=0, description="experts")
    top_k: int = Field(default=2, gt=0, description="experts that a token goes to")
    router: Order = Field(
        default="topk-softmax", description="softmax over the kept logits, or over all before the largest are kept"
    )
    renormalise: bool = Field(
        default=False, description="under softmax-topk, divide the kept gates by their sum (topk-softmax's sum to 1)"
    )
    balance_coef: float = Field(default=0.01, ge=0, description="factor of the load-balance loss of each router")
    z_coef: float = Field(default=0.001, ge=0, description="factor of the squared logsumexp of each router's logits")
    aux_reduction: Literal["sum", "mean"] = Field(
        default="sum", description="losses of all routers added up, or divided by the number of routers of an encoder"
    )
    dispatch: Literal["grouped", "loop"] = Field(
        default="grouped", description="grouped products of sorted tokens, or a plain loop over experts to compare with"
    )
    bias: bool = Field(default=True, description="one vector added after the experts are mixed")

    @model_validator(mode="after")
    def _routes(self) -> RoutedPart:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k} and there are {self.num_experts} experts; a token goes to at most all of them: lower "
                "top_k or raise num_experts."
            )
        if self.renormalise and self.router == "topk-softmax":
            raise ValueError(
                "renormalise has no meaning under router topk-softmax, whose gates sum to 1 already; remove it, or set router "
                "to softmax-topk."
            )
        if self.top_k == 1 and (self.router == "topk-softmax" or self.renormalise):
            raise ValueError(
                "top_k is 1 and gates are normalised over the kept experts, so that the one gate is always 1 and the router gets "
                "no gradient from the task; set router to softmax-topk with renormalise false, or top_k to 2 or more."
            )
        return self


class Census(nn.Module):
    """How many routers a model has."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = 0


class Router(Fine):
    """See the module's docstring.

    Attributes:
        statistics: of the last forward pass; None before the first.
    """

    def __init__(self, context: BuildContext, part: RoutedPart) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(part.num_experts, context.width))
        self.top_k, self.order, self.renormalise = part.top_k, part.router, part.renormalise
        self.balance_coef, self.z_coef, self.reduction = part.balance_coef, part.z_coef, part.aux_reduction
        self._census: tuple[Census] = (context.share("routers", Census),)
        self._census[0].routers += 1
        self.statistics: Statistics | None = None

    def forward(self, x_btd: Tensor, span: Span) -> Routing:
        """The routing of all tokens, flattened to n; leaves the auxiliary losses in the span."""
        x_nd = x_btd.flatten(0, 1)
        with torch.autocast(x_btd.device.type, enabled=False):
            fine = torch.promote_types(x_nd.dtype, torch.float32)
            logits_ne = F.linear(x_nd.to(fine), self.weight.to(fine))
            routing = choose(logits_ne, self.top_k, self.order, self.renormalise)
            valid_n = valid_tokens(x_btd, span)
            self._leave(routing, valid_n, span)
            self.statistics = statistics(routing, valid_n)
        return routing

    def _leave(self, routing: Routing, valid_n: Tensor | None, span: Span) -> None:
        share = 1.0 if self.reduction == "sum" else 1.0 / self._census[0].routers
        if self.balance_coef > 0:
            span.leave(self.balance_coef * share * balance_loss(routing, valid_n))
        if self.z_coef > 0:
            span.leave(self.z_coef * share * z_loss(routing, valid_n))

    def diagnostics(self) -> dict[str, float]:
        """Entropy, largest and smallest load relative to uniform, and experts without tokens, of the last forward pass."""
        return {} if self.statistics is None else self.statistics.numbers()

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * self.weight.numel()

    def activation_values(self) -> int:
        """Values per token kept for the backward pass: input and logits."""
        return sum(self.weight.shape)

    def parameter_roles(self) -> Roles:
        """A router is none of the usual matrices."""
        return {"weight": "other"}


def valid_tokens(x_btd: Tensor, span: Span) -> Tensor | None:
    """bool [n], False for padding; None where there is none."""
    return None if span.valid_bt is None else span.valid_bt.expand(x_btd.shape[:2]).flatten()
