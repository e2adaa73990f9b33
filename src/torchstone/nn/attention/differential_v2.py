"""Differential attention, version 2 (the authors' revision of January 2026: a note and code, no paper).

Ordinary grouped-query attention with 2h query heads of d channels; neighbours are subtracted:

    out_i = attention_{2i} − σ(W_λ x)_i · attention_{2i+1},   concat of h heads → W_o

λ is per token and head. There is no per-head norm, no λ_init and no constant factor, so any fused attention kernel
serves unchanged. W_q is twice as large as in plain attention; W_λ has h rows and no bias.

Shapes: b batch · t tokens · h heads · g KV heads · d head channels; u = 2h query heads.

Pitfall: both heads of a pair must read the same keys and values, so 2h/g must be even. Pairs that straddle KV groups
train unstably, by the authors' account, and are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.attention.difference import Difference
from torchstone.nn.attention.heads import Heads
from torchstone.nn.attention.mixer import AttentionMixer
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.context import BuildContext
from torchstone.nn.position.base import Position
from torchstone.nn.project import project, roles
from torchstone.nn.roles import Roles
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache


class DifferentialV2(AttentionMixer):
    """Version 2; see the module's docstring.

    Args:
        context: of the model.
        heads: differential heads h, KV heads, channels of a head.
        position: rotates queries and keys, or adds a bias to both maps of a head alike.
        window: sliding window in tokens, for both maps.
        score_processor: changes the scores of all maps before the softmax.

    Raises:
        ConfigError: 2h / KV heads is odd.
    """

    def __init__(
        self,
        context: BuildContext,
        heads: Heads,
        position: Position,
        window: int | None = None,
        score_processor: ScoreProcessor | None = None,
    ) -> None:
        kv_shape = (heads.kv, heads.dim)
        super().__init__(2 * heads.query, heads.query, kv_shape, kv_shape, position, score_processor, window)
        if heads.query % heads.kv:
            raise ConfigError(
                f"differential v2 with {heads.query} heads and {heads.kv} kv_heads has {2 * heads.query} query heads, "
                f"{2 * heads.query / heads.kv:g} to a group: pairs would straddle KV groups; choose kv_heads that "
                "divides heads, so that 2·heads/kv_heads is even."
            )
        self.head_dim = heads.dim
        width = context.width
        self.w_q = context.linear(width, 2 * heads.query * heads.dim, "input")
        self.w_k = context.linear(width, heads.kv * heads.dim, "input")
        self.w_v = context.linear(width, heads.kv * heads.dim, "input")
        self.w_lambda = context.linear(width, heads.query, "input")
        self.w_o = context.linear(heads.query * heads.dim, width, "output")
        self.mean_lambda: Tensor | None = None

    def forward(self, x_btd: Tensor, span: Span, state: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        """Mixed tokens [b, t, width] and the state, advanced by t tokens."""
        arrange = self.position.arrange
        layers = self.w_q, self.w_k, self.w_v, self.w_lambda
        q_bte, k_bte, v_bte, gate_bth = project(x_btd, *layers, arrange=(arrange, arrange, None, None))
        q_btud, k_btgd, v_btgd = (y.unflatten(-1, (-1, self.head_dim)) for y in (q_bte, k_bte, v_bte))
        offset = 0 if state is None else state.length
        q_btud, k_btgd = self.position.rotate(q_btud, k_btgd, span, offset)
        lambda_bth = gate_bth.to(torch.promote_types(gate_bth.dtype, torch.float32)).sigmoid()
        self.mean_lambda = lambda_bth.detach().mean()
        difference = Difference(lambda_bth.transpose(1, 2), neighbours=True)
        heads_bthd = self._attend(q_btud, k_btgd, v_btgd, span, state, difference).to(v_btgd.dtype)
        if self.observation is not None:
            self.observation.heads = heads_bthd
        return self._written(self.w_o(heads_bthd.flatten(2)), span), state

    def diagnostics(self) -> dict[str, float]:
        """Mean λ over the tokens and heads of the last forward pass; nothing before the first."""
        return {} if self.mean_lambda is None else {"lambda": float(self.mean_lambda)}

    def parameter_roles(self) -> Roles:
        """W_λ belongs to neither product."""
        return super().parameter_roles() | roles(self, {"w_lambda": "other"})
