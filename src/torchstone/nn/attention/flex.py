"""Attention with a bias on CUDA, through torch's FlexAttention: the kernel computes the bias of each score as it goes.

    scores = scale · q kᵀ + term(batch, head, query, key)

A fused kernel with a bias tensor must read [h, t, s] values from memory, more than all queries, keys and values of a long
sequence; a function of indices needs none of them. Windows, documents and padding become a block mask, which leaves out
blocks of 128 × 128 scores that are hidden altogether.

Shapes: b batch · u query sub-heads · h heads · g key heads · t tokens · d key channels · e value channels.

Pitfalls: not yet run on a GPU; the numbers are tested on the CPU, without the compiler. Only for passes whose queries and
keys are the same tokens in order (`Position.score_term`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from torchstone.nn.attention.mask import Mask
from torchstone.nn.position.base import ScoreTerm

SHORTEST = 128  # tokens from which a block mask and a kernel of its own pay
NARROWEST = 16  # channels of a head, the least that the kernels take


def fits_flex(q_butd: Tensor, mask: Mask) -> bool:
    """Whether this call is one for FlexAttention, given a bias."""
    large = q_butd.shape[2] >= SHORTEST and q_butd.shape[3] >= NARROWEST
    return q_butd.device.type == "cuda" and mask.causal and large


def flex_attention(
    q_butd: Tensor, k_bgsd: Tensor, v_bgse: Tensor, mask: Mask, scale: float, term: ScoreTerm, pairs: bool | None
) -> Tensor:
    """Outputs [b, u, t, e] of every sub-head.

    Args:
        q_butd, k_bgsd, v_bgse: a value head for every key head.
        mask: causal, whatever else it hides.
        scale: factor of the scores.
        term: the bias of one score, by batch, head, query and key.
        pairs: which sub-heads belong to a head: None one each, True neighbours, False i and h + i.
    """
    heads = q_butd.shape[1] if pairs is None else q_butd.shape[1] // 2

    def head_of(u: Tensor) -> Tensor:
        if pairs is None:
            return u
        return u // 2 if pairs else u % heads

    def add_bias(score: Tensor, b: Tensor, u: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + term(b, head_of(u), i, j)

    out_bute = _kernel(q_butd.device.type)(
        q_butd,
        k_bgsd,
        v_bgse,
        score_mod=add_bias,
        block_mask=_block_mask(mask, q_butd),
        scale=scale,
        enable_gqa=q_butd.shape[1] != k_bgsd.shape[1],
    )
    return mask.clear_empty(out_bute)


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    """torch's function, compiled where that is its point; a model that is compiled as a whole compiles it along."""
    from torch.nn.attention.flex_attention import flex_attention as plain

    compiled = torch.compile(plain) if device == "cuda" else plain

    def run(*tensors: Tensor, **settings: Any) -> Tensor:
        chosen: Any = plain if torch.compiler.is_compiling() else compiled
        out: Tensor = chosen(*tensors, **settings)
        return out

    return run


def _block_mask(mask: Mask, q_butd: Tensor) -> Any:
    """Made once per mask, which layers share."""
    length, device, allowed_b1ts = q_butd.shape[2], q_butd.device, mask.allowed_b1ts
    if allowed_b1ts is None:
        return _causal_blocks(length, device)
    rows = allowed_b1ts.shape[0]

    def visible(b: Tensor, u: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return allowed_b1ts[b if rows > 1 else 0, 0, i, j]

    return mask.once("flex", lambda: _blocks(visible, rows if rows > 1 else None, length, device))


@lru_cache(maxsize=8)
def _causal_blocks(length: int, device: torch.device) -> Any:
    return _blocks(lambda b, u, i, j: i >= j, None, length, device)


def _blocks(visible: Callable[..., Tensor], rows: int | None, length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(visible, rows, None, length, length, device=device)
