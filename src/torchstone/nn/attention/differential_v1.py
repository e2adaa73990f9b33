"""Differential attention, version 1 (Ye et al., arXiv 2410.05258, section 2).

h heads, each with two query-key sub-heads of d channels and one value head of 2d channels:

    out_i = (1 − λ_init) · RMSNorm( (softmax(q¹k¹ᵀ/√d) − λ softmax(q²k²ᵀ/√d)) v ),   concat → W_o
    λ     = exp(Σ λ_q1·λ_k1) − exp(Σ λ_q2·λ_k2) + λ_init,   one scalar for all heads of a layer
    λ_init = 0.8 − 0.6 exp(−0.3 ℓ),   ℓ the 0-based layer (the paper counts layers from 1)

Shapes: b batch · t tokens · h heads · g KV heads · d channels of a sub-head · e = 2d value channels ·
u sub-heads, 2h of queries and 2g of keys; sub-heads 2i and 2i+1 belong to head i.

Pitfalls
- With grouped KV heads (r = h/g > 1) the authors' two implementations are different functions. `kv_pairing: flash`
  gives map m of head i the key sub-head 2(i//r)+m; `naive` gives query sub-head s the key sub-head s//r. Without
  grouping they agree.
- The norm is per head, with eps 1e-5 and one gain of 2d channels shared by all heads, and is never computed in bf16.
- A token that sees only itself has both maps 1; the norm then removes |1 − λ|, so the sign changes where λ > 1.
- λ is not clamped; it may leave [0, 1]. Its vectors stay fp32 and are not decayed.
- The two maps have no common dropout mask, so there is no dropout on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchstone.nn.attention.difference import Difference
from torchstone.nn.attention.heads import Heads, check_groups
from torchstone.nn.attention.mixer import AttentionMixer
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.context import BuildContext
from torchstone.nn.norm.rmsnorm import RMSNorm
from torchstone.nn.position.base import Position
from torchstone.nn.precision import kept_fine
from torchstone.nn.project import project
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache

Pairing = Literal["flash", "naive"]
LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
LAMBDA_STD = 0.1


def scheduled_lambda(layer: int) -> float:
    """λ_init of a 0-based layer: 0.2, 0.356, 0.471, … towards 0.8."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DifferentialV1(AttentionMixer):
    """Version 1; see the module's docstring.

    Args:
        context: of the model.
        heads: differential heads, KV heads, channels of one sub-head.
        position: rotates every sub-head, or adds a bias to both maps of a head alike.
        lambda_init: the constant λ_init.
        head_norm: False leaves out the RMSNorm and keeps everything else, the factor 1 − λ_init included.
        kv_pairing: which key sub-head a query sub-head reads; see the pitfalls.
        window: sliding window in tokens, for both maps.
        score_processor: changes the scores of all maps before the softmax.
    """

    def __init__(
        self,
        context: BuildContext,
        heads: Heads,
        position: Position,
        lambda_init: float,
        head_norm: bool = True,
        kv_pairing: Pairing = "flash",
        window: int | None = None,
        score_processor: ScoreProcessor | None = None,
    ) -> None:
        check_groups("differential v1", heads)
        key_shape, value_shape = (2 * heads.kv, heads.dim), (heads.kv, 2 * heads.dim)
        super().__init__(2 * heads.query, heads.query, key_shape, value_shape, position, score_processor, window)
        self.head_dim, self.kv_pairing, self.lambda_init = heads.dim, kv_pairing, lambda_init
        width, queries, keys = context.width, 2 * heads.query * heads.dim, 2 * heads.kv * heads.dim
        self.w_q = context.linear(width, queries, "input")
        self.w_k = context.linear(width, keys, "input")
        self.w_v = context.linear(width, keys, "input")
        self.w_o = context.linear(queries, width, "output")
        self.lambda_q1 = nn.Parameter(torch.zeros(heads.dim, dtype=torch.float32))
        self.lambda_k1 = nn.Parameter(torch.zeros(heads.dim, dtype=torch.float32))
        self.lambda_q2 = nn.Parameter(torch.zeros(heads.dim, dtype=torch.float32))
        self.lambda_k2 = nn.Parameter(torch.zeros(heads.dim, dtype=torch.float32))
        self.norm = RMSNorm(2 * heads.dim, eps=1e-5) if head_norm else None

    def forward(self, x_btd: Tensor, span: Span, state: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        """Mixed tokens [b, t, width] and the state, advanced by t tokens."""
        arrange = self.position.arrange
        outputs = project(x_btd, self.w_q, self.w_k, self.w_v, arrange=(arrange, arrange, None))
        q_bte, k_bte, v_bte = outputs
        q_btud, k_btud = (y.unflatten(-1, (-1, self.head_dim)) for y in (q_bte, k_bte))
        v_btge = v_bte.unflatten(-1, (-1, 2 * self.head_dim))
        offset = 0 if state is None else state.length
        q_btud, k_btud = self.position.rotate(q_btud, k_btud, span, offset)
        if self.kv_pairing == "flash":
            q_btud, k_btud = _first_maps_first(q_btud), _first_maps_first(k_btud)
        difference = Difference(self.lambda_value().view(1, 1, 1), neighbours=self.kv_pairing == "naive")
        heads_bthe = self._attend(q_btud, k_btud, v_btge, span, state, difference)
        heads_bthe = self._normalise(heads_bthe).to(v_bte.dtype)
        if self.observation is not None:
            self.observation.heads = heads_bthe
        return self._written(self.w_o(heads_bthe.flatten(2)), span), state

    def lambda_value(self) -> Tensor:
        """λ, a scalar in fp32."""
        q1, k1, q2, k2 = (getattr(self, name) for name in LAMBDA_VECTORS)
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def diagnostics(self) -> dict[str, float]:
        """λ of this layer."""
        return {"lambda": float(self.lambda_value().detach())}

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """λ's vectors are drawn from N(0, 0.1²), whatever the model's initialisation."""
        return {name: lambda t, generator: t.normal_(0.0, LAMBDA_STD, generator=generator) for name in LAMBDA_VECTORS}

    def no_decay_parameters(self) -> tuple[str, ...]:
        """λ's vectors are not decayed."""
        return LAMBDA_VECTORS

    def _normalise(self, heads_bthe: Tensor) -> Tensor:
        """RMSNorm over the channels of each head, in fp32, and the constant 1 − λ_init."""
        normed_bthe = heads_bthe if self.norm is None else self.norm(heads_bthe)
        return (1.0 - self.lambda_init) * normed_bthe

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves follow the module; a conversion to half precision does not reach λ's vectors."""
        with kept_fine(self, LAMBDA_VECTORS):
            return super()._apply(fn, recurse)


def _first_maps_first(x_btud: Tensor) -> Tensor:
    """Sub-heads in the order: first maps of all heads, then second maps; ordinary grouping then pairs them."""
    return x_btud.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)
