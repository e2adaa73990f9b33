"""Causal multi-head attention, with shared key-value heads, a sliding window and normalised queries and keys.

    out = concat_i( softmax( q_i k_{i//r}ᵀ / √d ) v_{i//r} ) W_o

Multi-head (Vaswani et al. 2017) has r = 1 query head per key-value head, grouped-query (Ainslie et al., arXiv
2305.13245) more, multi-query (Shazeer, arXiv 1911.02150) a single key-value head. `qk_norm` puts an RMSNorm over each
head's channels of q and of k, before rotation, which bounds the scores (Henry et al., arXiv 2010.04245).

Shapes: b batch · t tokens · h query heads · g key-value heads · d head channels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from torchstone.nn.attention.heads import Heads, check_groups, resolve_heads
from torchstone.nn.attention.mixer import AttentionMixer, build_scores
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.context import BuildContext
from torchstone.nn.norm.rmsnorm import RMSNorm, rms_norm
from torchstone.nn.position.base import Position
from torchstone.nn.project import project
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field

WindowConvention = Literal["inclusive", "plus-one"]


def keys_in_window(window: int | None, convention: WindowConvention) -> int | None:
    """Keys that a query sees, itself included, in a sliding window of W: W (inclusive), or W + 1 (plus-one).

    Papers and code bases mean either by "a window of W"; RecurrentGemma's own code sees W + 1 keys.
    """
    return window + 1 if window is not None and convention == "plus-one" else window


class MultiHeadAttention(AttentionMixer):
    """Softmax attention; see the module's docstring."""

    def __init__(
        self,
        context: BuildContext,
        heads: Heads,
        position: Position,
        window: int | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        output_norm: bool = False,
        score_processor: ScoreProcessor | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        check_groups("attention", heads)
        kv_shape = (heads.kv, heads.dim)
        super().__init__(heads.query, heads.query, kv_shape, kv_shape, position, score_processor, window, dropout)
        queries, keys = heads.query * heads.dim, heads.kv * heads.dim
        self.w_q = context.linear(context.width, queries, "input", qkv_bias)
        self.w_k = context.linear(context.width, keys, "input", qkv_bias)
        self.w_v = context.linear(context.width, keys, "input", qkv_bias)
        self.w_o = context.linear(queries, context.width, "output", output_bias)
        self.q_norm = RMSNorm(heads.dim) if qk_norm else None
        self.k_norm = RMSNorm(heads.dim) if qk_norm else None
        self.output_norm = RMSNorm(heads.dim, eps=1e-5) if output_norm else None
        self.head_dim = heads.dim

    def forward(self, x_btd: Tensor, span: Span, state: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        """Mixed tokens [b, t, width] and the state, advanced by t tokens."""
        arrange = self.position.arrange
        outputs = project(x_btd, self.w_q, self.w_k, self.w_v, arrange=(arrange, arrange, None))
        q_bthd, k_btgd, v_btgd = (y.unflatten(-1, (-1, self.head_dim)) for y in outputs)
        if self.q_norm is not None and self.k_norm is not None:
            q_bthd = rms_norm(q_bthd, arrange(self.q_norm.gain), self.q_norm.eps)
            k_btgd = rms_norm(k_btgd, arrange(self.k_norm.gain), self.k_norm.eps)
        offset = 0 if state is None else state.length
        q_bthd, k_btgd = self.position.rotate(q_bthd, k_btgd, span, offset)
        heads_bthd = self._attend(q_bthd, k_btgd, v_btgd, span, state)
        if self.output_norm is not None:
            heads_bthd = self.output_norm(heads_bthd)
        if self.observation is not None:
            self.observation.heads = heads_bthd
        return self._written(self.w_o(heads_bthd.flatten(2)), span), state


class AttentionConfig(Part):
    """`mixer: attention`."""

    family: ClassVar[str] = "mixer"
    kind: Literal["attention"] = "attention"
    heads: int | None = Field(default=None, gt=0, description="query heads; null: width / head_dim")
    kv_heads: int | None = Field(default=None, gt=0, description="key-value heads; null: as many as query heads")
    head_dim: int | None = Field(
        default=None, gt=0, description="channels per head; null: width / heads, or the model's head_dim"
    )
    window: int | None = Field(default=None, gt=0, description="sliding window in tokens; null: the whole past")
    window_convention: WindowConvention = Field(
        default="inclusive", description="keys that a window of W sees: W with the current one, or W + 1 (plus-one)"
    )
    qk_norm: bool = Field(default=False, description="RMSNorm over the channels of each query and key head")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the attention maps, in training")
    output_norm: bool = Field(
        default=False,
        description="RMSNorm over the channels of each head's output (a control for differential attention)",
    )
    qkv_bias: bool = Field(default=False, description="biases of the query, key and value projections")
    output_bias: bool = Field(default=False, description="bias of the output projection")
    position: part_field("position") = {"kind": "rotary"}  # type: ignore[valid-type]
    score_processor: part_field("score_processor") | None = Field(  # type: ignore[valid-type]
        default=None, description="what changes the scores before the softmax; null: nothing"
    )

    def build(self, context: BuildContext) -> MultiHeadAttention:
        """The module; raises ConfigError where head counts and width do not fit."""
        heads = resolve_heads("attention", context, self.heads, self.kv_heads, self.head_dim)
        position, processor = build_scores(self, context, heads.dim, heads.query, heads.query)
        window = keys_in_window(self.window, self.window_convention)
        norms = self.qk_norm, self.dropout, self.output_norm
        biases = self.qkv_bias, self.output_bias
        return MultiHeadAttention(context, heads, position, window, *norms, processor, *biases)
