"""What all attention mixers share: keys from this pass or from a state, the mask, the core and the counts.

Shapes: b batch · u query sub-heads · h heads · g key heads · t queries · s keys · d key channels · e value channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchstone.nn.attention.bias import parallel_bias, step_bias
from torchstone.nn.attention.core import attend
from torchstone.nn.attention.difference import Difference
from torchstone.nn.attention.mask import parallel_mask, step_mask
from torchstone.nn.attention.observe import Observable
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.context import BuildContext
from torchstone.nn.position.base import Position, PositionContext
from torchstone.nn.project import layer_flops, matrices, roles
from torchstone.nn.roles import Role, Roles
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache
from torchstone.recipe.part import Part


def build_scores(
    config: Part, context: BuildContext, head_dim: int, heads: int, maps: int
) -> tuple[Position, ScoreProcessor | None]:
    """Position and score processor of a mixer's configuration.

    Args:
        config: has `position` and `score_processor`.
        context: of the model.
        head_dim: channels of one query-key (sub-)head.
        heads, maps: heads, each with a bias of its own, and softmax maps, all of which a processor sees.
    """
    chosen: Any = config
    processed = chosen.score_processor is not None
    position = chosen.position.build(PositionContext(head_dim, heads, context.length, processed))
    processor = chosen.score_processor.build(maps, position.biased) if processed else None
    return position, processor


class AttentionMixer(Observable):
    """Base of attention mixers.

    Args:
        maps, heads: softmax maps per token, and heads that read values with (combinations of) them.
        key_shape, value_shape: (heads, channels) of keys and of values, as the state stores them.
        position: turns queries and keys, or adds a bias to their scores.
        score_processor: stands between scores and softmax; None for plain scores.
        window: sliding window in tokens, the current one included; None sees everything before.
        dropout: probability of dropping a map entry in training, drawn from torch's default generator.
    """

    def __init__(
        self,
        maps: int,
        heads: int,
        key_shape: tuple[int, int],
        value_shape: tuple[int, int],
        position: Position,
        score_processor: ScoreProcessor | None = None,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.maps, self.heads, self.key_shape, self.value_shape = maps, heads, key_shape, value_shape
        self.window, self.dropout = window, dropout
        self.scale = key_shape[1] ** -0.5
        self.position, self.score_processor = position, score_processor

    def new_state(self, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype) -> KVCache:
        """An empty cache for `capacity` tokens a row (a sliding window stores at most `window`)."""
        return KVCache(batch, capacity, self.key_shape, self.value_shape, self.window, device, dtype)

    def flops(self, length: int) -> float:
        """Forward FLOPs per token: projections, scores of every map, their processor, values of every head, in full.

        Causal and windowed kernels skip part of the maps; the count does not, as torch's own counter does not. Fused
        kernels that cannot combine maps read the values once per map, which the count leaves out. Biases of positions
        are made once for all rows and count as nothing.
        """
        projections = sum(layer_flops(layer) for name, layer in self.named_children() if name.startswith("w_"))
        processing = 0.0 if self.score_processor is None else self.score_processor.flops(length)
        maps = 2 * length * (self.maps * self.key_shape[1] + self.heads * self.value_shape[1])
        return projections + maps + processing

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging; plain attention has none."""
        return {}

    def parameter_roles(self) -> Roles:
        """Queries and keys meet in one product, values and outputs in another."""
        products: dict[str, Role] = {"w_q": "attention_qk", "w_k": "attention_qk"}
        return roles(self, {**products, "w_v": "attention_vo", "w_o": "attention_vo"})

    def residual_parameters(self) -> tuple[str, ...]:
        """Weights that write into the residual stream."""
        return matrices(self, "w_o")

    def _written(self, y_btd: Tensor, span: Span) -> Tensor:
        """What goes into the residual stream: 0 for padding, whatever a bias or a projection makes of its zeros."""
        return y_btd if span.valid_bt is None else y_btd.masked_fill(~span.valid_bt.unsqueeze(-1), 0.0)

    def _attend(
        self,
        q_btud: Tensor,
        k_btgd: Tensor,
        v_btge: Tensor,
        span: Span,
        state: KVCache | None,
        difference: Difference | None = None,
    ) -> Tensor:
        """Attention outputs [b, t, h, e] of the new tokens, with the old keys where there is a state."""
        q_butd, k_bgsd, v_bgse = q_btud.transpose(1, 2), k_btgd.transpose(1, 2), v_btge.transpose(1, 2)
        length = q_butd.shape[2]
        if state is None:
            mask = parallel_mask(span, length, self.window, q_butd.device)
            bias = parallel_bias(self.position, span, length, q_butd.device)
        else:
            keys = state.extend(k_bgsd, v_bgse, span.segments())
            if self.score_processor is not None and self.score_processor.reach > 0:
                keys = keys.in_order()
            k_bgsd, v_bgse = keys.k_bgsd.to(q_butd.dtype), keys.v_bgse.to(q_butd.dtype)
            mask = step_mask(span, keys, length, self.window)
            bias = step_bias(self.position, span, keys, length, self.window)
        out_bhte = attend(
            q_butd,
            k_bgsd,
            v_bgse,
            mask,
            scale=self.scale,
            difference=difference,
            dropout=self.dropout if self.training else 0.0,
            observation=self.observation,
            bias=bias,
            processor=self.score_processor,
        )
        return out_bhte.transpose(1, 2)
