"""What a model loses when every query-key product is cut to a lower rank: what the rank is good for.

W_q[h] is replaced so that W_kᵀ W_q[h] is the nearest matrix of rank r to what it was (Eckart and Young), while keys, which other
heads may share, stay. Rank r = d changes nothing.

Pitfalls
- Under rotary positions the product that is cut is that at offset 0; at other offsets the rank is at most r as well, but the
  matrix need not be the nearest one. Where queries pass a norm, it sees the cut queries.
- Biases of the projections stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from torchstone.diagnose.ranks.head_products import HeadProducts
from torchstone.diagnose.ranks.layer_products import bare_factors, shared_heads
from torchstone.diagnose.subject import AttentionLayer, Projection, Subject, require_attention
from torchstone.errors import ConfigError


def truncation_losses(subject: Subject, tokens_bt: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """Mean loss in nats per token with every QK_h cut to each rank; the model's weights are put back.

    Args:
        subject: a model whose layers have projections of their own.
        tokens_bt: int64 [b, t].
        ranks: from 1 to the channels of a head.

    Raises:
        ConfigError: a rank out of range, or a layer without projections of its own.
    """
    losses = {}
    for rank in ranks:
        with truncated(subject, rank):
            losses[rank] = float(subject.losses(tokens_bt).double().mean())
    return losses


@contextmanager
def truncated(subject: Subject, rank: int) -> Iterator[None]:
    """Inside the block every layer's W_q is cut; raises ConfigError (see `truncation_losses`)."""
    require_attention(subject)
    size = min(layer.head_dim for layer in subject.layers)
    if not 1 <= rank <= size:
        raise ConfigError(
            f"cannot cut query-key products to rank {rank}; ranks go from 1 to {size}, the channels of a head."
        )
    with ExitStack() as stack:
        for layer in subject.layers:
            stack.enter_context(truncated_queries(layer, rank))
        yield


@contextmanager
def truncated_queries(layer: AttentionLayer, rank: int) -> Iterator[None]:
    """Inside the block W_q of a layer is cut so that every W_kᵀ W_q[h] has at most this rank."""
    weights = layer.weights()
    cut_hdw = HeadProducts(*bare_factors(layer, weights, "QK"), shared_heads(weights)[0]).truncated_own(rank)
    projection = layer.projection("q")
    before = projection.weight().clone()
    try:
        _write(projection, cut_hdw.flatten(0, 1).to(before.dtype))
        yield
    finally:
        _write(projection, before)


@torch.no_grad()
def _write(projection: Projection, weight: Tensor) -> None:
    """Put a matrix [out, in] where the projection is."""
    whole: Tensor = projection.module.weight  # type: ignore[assignment]
    stored = whole.T if projection.transposed else whole
    if projection.rows is None:
        stored.copy_(weight)
    else:
        stored[projection.rows.to(whole.device)] = weight
