"""What all attention mixers share: keys from this pass or from a state, the mask, the core and the counts.

Shapes: b batch · u query sub-heads · h heads · g key heads · t queries · s keys · d key channels · e value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.nn.attention.core import Difference, attend
from torchstone.nn.attention.mask import parallel_mask, step_mask
from torchstone.nn.attention.observe import Observable
from torchstone.nn.span import Span
from torchstone.nn.state import KVCache


class AttentionMixer(Observable):
    """Base of attention mixers.

    Args:
        maps, heads: softmax maps per token, and heads that read values with (combinations of) them.
        key_shape, value_shape: (heads, channels) of keys and of values, as the state stores them.
        window: sliding window in tokens, the current one included; None sees everything before.
        dropout: probability of dropping a map entry in training, drawn from torch's default generator.
    """

    def __init__(
        self,
        maps: int,
        heads: int,
        key_shape: tuple[int, int],
        value_shape: tuple[int, int],
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.maps, self.heads, self.key_shape, self.value_shape = maps, heads, key_shape, value_shape
        self.window, self.dropout = window, dropout
        self.scale = key_shape[1] ** -0.5

    def new_state(self, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype) -> KVCache:
        """An empty cache for `capacity` tokens a row (a sliding window stores at most `window`)."""
        return KVCache(batch, capacity, self.key_shape, self.value_shape, self.window, device, dtype)

    def flops(self, length: int) -> float:
        """Forward FLOPs per token: all projections, the scores of every map and the values of every head, in full.

        Causal and windowed kernels skip part of the maps; the count does not, as torch's own counter does not. Fused
        kernels that cannot combine maps read the values once per map, which the count leaves out.
        """
        projections = sum(2 * weight.numel() for weight in self.parameters() if weight.dim() == 2)
        return projections + 2 * length * (self.maps * self.key_shape[1] + self.heads * self.value_shape[1])

    def diagnostics(self) -> dict[str, float]:
        """Numbers worth logging; plain attention has none."""
        return {}

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
        else:
            keys = state.extend(k_bgsd, v_bgse, span.segments())
            k_bgsd, v_bgse = keys.k_bgsd.to(q_butd.dtype), keys.v_bgse.to(q_butd.dtype)
            mask = step_mask(span, keys, length, self.window)
        out_bhte = attend(
            q_butd,
            k_bgsd,
            v_bgse,
            mask,
            scale=self.scale,
            difference=difference,
            dropout=self.dropout if self.training else 0.0,
            observation=self.observation,
        )
        return out_bhte.transpose(1, 2)
