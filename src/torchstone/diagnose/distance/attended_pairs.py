"""Run through the pairs of tokens of one attention layer in blocks of queries, and add them to distance sums.

Attention weights are computed again from queries and keys, a block of rows at a time (`rotary.recomputed`). Where a model does
more than softmax(q·k · scale) (a cap on the logits, a bias), that is noticed: the recomputed weights must reproduce the
layer's own output.

    all keys      every earlier key of each query, with its weight
    top keys      only the `keys` largest weights of each query: 64 instead of thousands on long inputs
    queries       on long inputs only every second, third … query is read
    random        pairs drawn evenly, all with weight 1: what rotation and content say where attention does not choose

The attention to each distance is always summed over all keys of the queries that are read.

Shapes: h query heads · r queries of a block · s keys · d channels · e value channels · m frequency pairs · n pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from torchstone.diagnose.distance.sums import SumsBuilder
from torchstone.diagnose.rotary.pairs import pair_products
from torchstone.diagnose.rotary.recomputed import BLOCK_NUMBERS, LayerInputs, blocks, distances, recomputed_error
from torchstone.errors import ConfigError

PairChoice = Literal["attended", "random"]
RANDOM_PER_TOKEN = 100
MISMATCH = 0.05  # relative error of the recomputed output beyond which the weights are not those of the model


def add_attended(
    layer: LayerInputs, builder: SumsBuilder, skip_sink: int, keys: int | None, queries: int | None = None
) -> None:
    """Add the earlier keys of each query, or the `keys` most attended of them, weighted by attention.

    `queries`: how many are read, evenly spread; None: all.
    """
    _check_recomputed(layer)
    few = keys is not None and keys < layer.length - 1
    for block in blocks(layer, queries, 1 if few else layer.q_htd.shape[-1] // 2):
        weights_hrs = _read(layer, builder, block, skip_sink)
        weights_hrs[:, range(len(block)), list(block)] = 0  # a token is not earlier than itself
        if few and keys is not None and keys < block[-1] + 1:
            _add_top(layer, builder, weights_hrs, block, keys)
        else:
            rows = slice(block.start, block.stop, block.step)
            parts_hrsm = pair_products(layer.q_htd[:, rows, None], layer.k_hsd[:, None, : block[-1] + 1])
            distance_hrs = distances(block, weights_hrs.device).clamp(min=0).expand_as(weights_hrs)
            builder.add(parts_hrsm.flatten(1, 2), weights_hrs.flatten(1), distance_hrs.flatten(1))


def _read(layer: LayerInputs, builder: SumsBuilder, block: range, skip_sink: int) -> Tensor:
    """Weights [h, r, s] without the sinks, after they were added up by distance."""
    weights_hrs = layer.rows(block)
    weights_hrs[..., :skip_sink] = 0
    counted_rs = (distances(block, weights_hrs.device) >= 0).to(weights_hrs.dtype)
    counted_rs[:, :skip_sink] = 0
    attention_ht = _by_distance(weights_hrs, block.step, builder.length).double()
    builder.add_attention(attention_ht, _by_distance(counted_rs[None], block.step, builder.length)[0].double())
    return weights_hrs


def _add_top(layer: LayerInputs, builder: SumsBuilder, weights_hrs: Tensor, block: range, keys: int) -> None:
    heads, length, channels = layer.k_hsd.shape
    first_h11 = torch.arange(heads, device=weights_hrs.device)[:, None, None] * length
    k_nd = layer.k_hsd.reshape(heads * length, channels)
    size = max(1, BLOCK_NUMBERS // (heads * keys * channels))
    for first in range(0, len(block), size):
        part = block[first : first + size]
        weight_hrn, key_hrn = weights_hrs[:, first : first + size].topk(keys, dim=-1, sorted=False)
        k_hrnd = functional.embedding(key_hrn + first_h11, k_nd)
        q_hr1d = layer.q_htd[:, part.start : part.stop : part.step, None]
        query_r1 = torch.arange(part.start, part.stop, part.step, device=key_hrn.device)[:, None]
        distance_hrn = (query_r1 - key_hrn).clamp(min=0)  # below 0 only where the weight is 0
        parts_hrnm = pair_products(q_hr1d, k_hrnd)
        builder.add(parts_hrnm.flatten(1, 2), weight_hrn.flatten(1), distance_hrn.flatten(1))


def add_random(
    layer: LayerInputs,
    builder: SumsBuilder,
    skip_sink: int,
    pairs: tuple[Tensor, Tensor],
    queries: int | None = None,
) -> None:
    """Add drawn pairs (positions of queries, of keys) with weight 1; attention is read for its distances alone."""
    _check_recomputed(layer)
    for block in blocks(layer, queries, 1):
        _read(layer, builder, block, skip_sink)
    heads, _, channels = layer.q_htd.shape
    size = max(1, BLOCK_NUMBERS // (heads * channels))
    for i_n, j_n in zip(pairs[0].split(size), pairs[1].split(size), strict=True):
        parts_hnm = pair_products(layer.q_htd[:, i_n], layer.k_hsd[:, j_n])
        builder.add(parts_hnm, parts_hnm.new_ones(heads, len(i_n)), (i_n - j_n).expand(heads, -1))


def _by_distance(values_hrs: Tensor, step: int, length: int) -> Tensor:
    """Sums [h, length] over equal i - j of causal values; the last query is the last key, the others `step` apart."""
    heads, rows, keys = values_hrs.shape
    # row ρ (from the last) is moved step · ρ places to the right: column key + step · ρ = constant - (i - j)
    width = keys + step * (rows - 1)
    padded = functional.pad(values_hrs.flip(1), (0, width + step - keys)).flatten(1)[:, : rows * width]
    column_hc = padded.view(heads, rows, width).sum(1)
    by_distance_ht = column_hc[:, :keys].flip(1)  # columns beyond are keys after their query, whose values are 0
    return functional.pad(by_distance_ht, (0, length - keys))


def _check_recomputed(layer: LayerInputs) -> None:
    """Raise where queries and keys alone do not explain the layer's own output."""
    error = recomputed_error(layer)
    if not error <= MISMATCH:
        raise ConfigError(
            f"attention computed again from queries and keys differs from the layer's own output by {error:.0%}, so this model "
            "does more than softmax(q·k): a cap on the logits, a bias, sinks. Use maps='model', which reads the model's own "
            "weights (for a Hugging Face model load it with attn_implementation='eager')."
        )
