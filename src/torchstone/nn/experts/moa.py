"""MoA: a mixture of attention heads (Zhang et al., arXiv 2210.05144; as in JetMoE, arXiv 2404.07413, section 3.2).

    K, V = W_k x, W_v x                          n heads, shared by all experts
    q_j  = Wq_{e_j} x,                           n heads for each of the k experts of the token
    y    = b + Σ_{j ≤ k} g_j Wo_{e_j} o_j,       o_j = what the heads of q_j read

An expert is a query projection and an output projection. A token chooses its experts once, from the layer's input, for both. Keys
and values are those of every expert, so that the cache is as small as that of n heads, and a query may use any expert whatever
the tokens before it used.

Shapes: b batch · t tokens · n = b·t flattened · d width · e experts · k slots · g key-value heads · h = g·k query heads ·
c channels of a head · m = n·k rows.

Head order: JetMoE numbers heads slot by slot, head j·g + i being slot j of key head i, and repeats keys as a whole.
Attention here (and `observe`) has the heads of one key head side by side: head i·k + j. Only the numbering differs.

Pitfalls: slots are ordered by gate, so head i·k is always that of the token's best expert, another one for each token.
Where positions bias scores (ALiBi, Kerple), a head's bias therefore belongs to the slot, not to the expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.nn.attention.heads import resolve_heads
from torchstone.nn.attention.mixer import AttentionMixer
from torchstone.nn.attention.replacing import refuse_lost
from torchstone.nn.context import BuildContext
from torchstone.nn.experts.dispatch import DISPATCHES, Dispatch
from torchstone.nn.experts.router import RoutedPart, Router
from torchstone.nn.position.base import PositionContext
from torchstone.nn.project import project, roles
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache
from torchstone.recipe.registry import part_field


class MixtureOfAttentionHeads(AttentionMixer):
    """See the module's docstring.

    Attributes:
        w_k, w_v: dense maps to the shared keys and values.
        query_experts: [e, g·c, d].
        output_experts: [e, d, g·c].
    """

    def __init__(self, context: BuildContext, part: MoAConfig, kv_heads: int, head_dim: int) -> None:
        heads, shape = kv_heads * part.top_k, (kv_heads, head_dim)
        position = part.position.build(PositionContext(head_dim, heads, context.length))
        super().__init__(heads, heads, shape, shape, position, window=part.window)
        width, inner = context.width, kv_heads * head_dim
        self.router = Router(context, part)
        self.top_k, self.dispatch = part.top_k, DISPATCHES[part.dispatch]
        self.w_k = context.linear(width, inner, "input")
        self.w_v = context.linear(width, inner, "input")
        self.query_experts = nn.Parameter(torch.empty(part.num_experts, inner, width))
        self.output_experts = nn.Parameter(torch.empty(part.num_experts, width, inner))
        self.bias = nn.Parameter(torch.empty(width)) if part.bias else None

    def forward(self, x_btd: Tensor, span: Span, state: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        """Mixed tokens [b, t, width] and the state, advanced by t tokens."""
        arrange, shape = self.position.arrange, (*x_btd.shape[:2], *self.key_shape)
        routing = self.router(x_btd, span)
        dispatch: Dispatch = self.dispatch(routing)
        k_btgc, v_btgc = (y.view(shape) for y in project(x_btd, self.w_k, self.w_v, arrange=(arrange, None)))
        weight = arrange(self.query_experts.flatten(0, 1)).view_as(self.query_experts)
        q_nki = dispatch.collect(dispatch.apply(dispatch.spread(x_btd.flatten(0, 1)), weight))
        q_bthc = q_nki.view(*shape[:2], self.top_k, *self.key_shape).transpose(2, 3).flatten(2, 3)
        offset = 0 if state is None else state.length
        q_bthc, k_btgc = self.position.rotate(q_bthc, k_btgc, span, offset)
        heads_bthc = self._attend(q_bthc, k_btgc, v_btgc, span, state)
        if self.observation is not None:
            self.observation.heads = heads_bthc
        o_nki = heads_bthc.unflatten(2, (-1, self.top_k)).transpose(2, 3).flatten(3).flatten(0, 1)
        rows_md = dispatch.apply(dispatch.place(o_nki), self.output_experts)
        y_btd = dispatch.combine(rows_md, routing.gates_nk).view(x_btd.shape)
        if self.bias is not None:
            y_btd = y_btd + self.bias.to(y_btd.dtype)
        return self._written(y_btd, span), state

    def flops(self, length: int) -> float:
        """Forward FLOPs per token: router, keys and values, the experts that a token uses, maps in full."""
        experts = 2.0 * self.top_k * (self.query_experts[0].numel() + self.output_experts[0].numel())
        return super().flops(length) + self.router.flops() + experts

    def inactive_parameters(self) -> int:
        """Parameters that one token does not use."""
        unused = self.query_experts.shape[0] - self.top_k
        return unused * (self.query_experts[0].numel() + self.output_experts[0].numel())

    def activation_values(self) -> int:
        """Values per token kept for the backward pass: inputs and outputs of both products of its experts."""
        return self.top_k * (sum(self.query_experts.shape[1:]) + sum(self.output_experts.shape[1:]))

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the router's last pass."""
        return self.router.diagnostics()

    def parameter_roles(self) -> Roles:
        """Queries and keys meet in one product, values and outputs in another."""
        dense = roles(self, {"w_k": "attention_qk", "w_v": "attention_vo"})
        return {**dense, "query_experts": "attention_qk", "output_experts": "attention_vo"}

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return ("output_experts",)


class MoAConfig(RoutedPart):
    """`mixer: moa`."""

    family: ClassVar[str] = "mixer"
    kind: Literal["moa"] = "moa"
    heads: int | None = Field(
        default=None, gt=0, description="query heads of a token, top_k × kv_heads; null: follows from the others"
    )
    kv_heads: int | None = Field(
        default=None,
        gt=0,
        description="key-value heads, and query heads of an expert; null: heads, or width/head_dim, over top_k",
    )
    head_dim: int | None = Field(
        default=None, gt=0, description="channels per head; null: width / heads, or the model's head_dim"
    )
    window: int | None = Field(default=None, gt=0, description="sliding window in tokens; null: the whole past")
    position: part_field("position") = {"kind": "rotary"}  # type: ignore[valid-type]

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """What attention has too; its `output_bias` is `bias` here, which is on unless it is set.

        Raises:
            ConfigError: the replaced attention has a setting that this kind lacks, which would be lost unseen.
        """
        refuse_lost(cls, previous, kept=("output_bias",))
        return super().inherit(previous)

    def build(self, context: BuildContext) -> MixtureOfAttentionHeads:
        """The module; raises ConfigError where head counts do not fit."""
        if self.kv_heads is not None:
            kv_heads, head_dim = self.kv_heads, self._head_dim_beside(self.kv_heads, context)
        else:
            heads = resolve_heads("moa", context, self.heads, None, self.head_dim)
            if heads.query % self.top_k:
                raise ConfigError(
                    f"moa: {heads.query} query heads are no multiple of top_k {self.top_k}; change one, or give kv_heads, the "
                    "query heads of one expert."
                )
            kv_heads, head_dim = heads.query // self.top_k, heads.dim
        return MixtureOfAttentionHeads(context, self, kv_heads, head_dim)

    def _head_dim_beside(self, kv_heads: int, context: BuildContext) -> int:
        """Channels of a head where kv_heads is given: more or fewer heads than the model's, of the model's size."""
        if self.heads is None:
            return context.head_dim if self.head_dim is None else self.head_dim
        if self.heads != self.top_k * kv_heads:
            raise ConfigError(
                f"moa: heads is {self.heads}, and top_k {self.top_k} × kv_heads {kv_heads} = {self.top_k * kv_heads}; a token "
                "has kv_heads query heads for each of its experts: change one of them, or leave out heads."
            )
        return resolve_heads("moa", context, self.heads, kv_heads, self.head_dim).dim
