"""Attention weights of one layer and one row of tokens, computed again from queries and keys, a block of queries at a time.

    weights = softmax(q·k · scale) over the keys that a causal mask and the layer's window leave

so that no [h, t, t] tensor exists; a fused kernel gives none anyway. Where a model does more (a cap on the logits, a bias,
sinks, a difference of two maps), these weights are not its own. `recomputed_error` tells: with the layer's own weights, the
values must give the layer's own output.

Shapes: h query heads · t queries · r queries of a block · s keys · d channels · e value channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_NUMBERS = 1 << 22  # numbers of one temporary of a block
CHECKED = 16  # queries whose recomputed output is compared


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """One sequence in one layer.

    Attributes:
        q_htd, k_hsd, v_hse: rotated queries and keys in half order, and values, repeated to one head per query head.
        output_the: per-head outputs, or None to check nothing.
        weights_hts: the model's own attention weights, or None to compute them.
        scale: factor of q·k in the logits.
        window: sliding window in tokens, or None.
    """

    q_htd: Tensor
    k_hsd: Tensor
    v_hse: Tensor | None
    output_the: Tensor | None
    weights_hts: Tensor | None
    scale: float
    window: int | None

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.q_htd.shape[1]

    def rows(self, queries: range) -> Tensor:
        """Attention weights [h, r, s] of some queries on the keys up to the last of them, as a new tensor."""
        rows, stop = slice(queries.start, queries.stop, queries.step), queries[-1] + 1
        if self.weights_hts is not None:
            return self.weights_hts[:, rows, :stop].clone()
        scores_hrs = self.q_htd[:, rows] @ self.k_hsd[:, :stop].transpose(1, 2) * self.scale
        distance_rs = distances(queries, scores_hrs.device)
        hidden_rs = distance_rs < 0
        if self.window is not None:
            hidden_rs |= distance_rs >= self.window
        return scores_hrs.masked_fill_(hidden_rs, -torch.inf).softmax(-1)


def distances(queries: range, device: torch.device) -> Tensor:
    """i - j, int64 [r, s], of queries and the keys up to the last of them."""
    queries_r = torch.arange(queries.start, queries.stop, queries.step, device=device)
    return queries_r[:, None] - torch.arange(queries[-1] + 1, device=device)


def blocks(layer: LayerInputs, most: int | None, width: int) -> list[range]:
    """Queries, at most `most` of them and evenly spread, in blocks whose temporaries stay small.

    Args:
        width: numbers of a temporary per query and key.
    """
    heads, length = layer.q_htd.shape[:2]
    step = 1 if most is None else max(1, -(-length // most))
    size = max(1, BLOCK_NUMBERS // (heads * length * width)) * step
    return [range(start, min(start + size, length), step) for start in range(step - 1, length, size)]


def recomputed_error(layer: LayerInputs) -> float:
    """Relative error of the output that the recomputed weights give, against the layer's own, on the last queries.

    0 where the weights are the model's own or there is no output to compare with.
    """
    if layer.weights_hts is not None or layer.output_the is None or layer.v_hse is None:
        return 0.0
    last = range(max(0, layer.length - CHECKED), layer.length)
    expected_hre = layer.output_the[last.start :].transpose(0, 1)
    found_hre = layer.rows(last) @ layer.v_hse
    return float((found_hre - expected_hre).norm() / expected_hre.norm().clamp(min=1e-30))
