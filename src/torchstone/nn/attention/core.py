"""Scaled dot-product attention: one eager core that shows every step, and the fast kernels.

    scores = scale · q kᵀ,   maps = softmax(scores over visible keys),   weights = combine(maps),   out = weights · v
                                                                                              (Vaswani et al. 2017)

Shapes: b batch · u query sub-heads, one map each · h heads, u for plain attention · g key heads (g divides u) ·
t queries · s keys · d key channels · e value channels.

`combine` makes the weights of h heads from u maps: nothing for plain attention, a difference of two maps for
differential attention. It must be linear, so that it may act on the maps or on their outputs, whichever is cheaper.

`eager_attention` is the meaning, and what runs when a model is observed (`nn.attention.observe`). `fused_attention` is
the same function through torch's fused kernels, which never hold a map. A mixer calls `attend`, which chooses:

- observed: eager, everything recorded.
- CPU, up to BLOCKED_LENGTH tokens, in half precision or with `combine`: eager in blocks of queries. A block ignores
  the keys after its last query, which saves nearly half of the work, and two maps are subtracted before the values are
  read. The CPU's fused kernel is about half as fast there; for longer sequences its small memory is worth more.
- otherwise: fused.

Pitfalls: the softmax is in fp32 whatever the inputs, but in half precision the eager scores are rounded before it;
dropout acts on the weights, in training only. No fused CPU kernel accepts d != e (differential attention), so q and k
are then padded with zero channels, which leaves the scores as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.nn.attention.mask import Mask
from torchstone.nn.attention.observe import Observation

Combine = Callable[[Tensor, slice], Tensor]  # [b, u, rows, …] and which queries these rows are → [b, h, rows, …]
BLOCKED_LENGTH = 1024
BLOCKS, SMALLEST_BLOCK = 4, 64


def attend(
    q_butd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    *,
    scale: float,
    combine: Combine | None = None,
    spread_values: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    observation: Observation | None = None,
) -> Tensor:
    """Outputs [b, h, t, e]; sub-head i reads key head i // (u/g), head i reads value head i // (h / value heads).

    Args:
        mask: visibility, from `parallel_mask` or `step_mask`.
        scale: factor of the scores, usually 1/√d.
        combine: linear map from sub-heads to heads; None where they are the same.
        spread_values: gives every key head a value head, for kernels that cannot combine maps; None where there are
            equally many.
        dropout: probability of dropping a weight in this call (0 outside training).
        observation: filled, through the eager core, when given.
    """
    queries = q_butd.shape[2]
    if observation is not None:
        return eager_attention(q_butd, k_bgsd, v_bgse, mask, scale, combine, dropout, queries, observation)
    if _blocked(q_butd, mask, combine):
        block = max(SMALLEST_BLOCK, ceil(queries / BLOCKS))
        return eager_attention(q_butd, k_bgsd, v_bgse, mask, scale, combine, dropout, block, None)
    if spread_values is not None:
        v_bgse = spread_values(v_bgse)
    out_bute = fused_attention(q_butd, k_bgsd, v_bgse, mask, scale, dropout)
    return out_bute if combine is None else combine(out_bute, slice(0, queries))


def _blocked(q_butd: Tensor, mask: Mask, combine: Combine | None) -> bool:
    """Whether the eager core in blocks is the fastest way."""
    short = q_butd.device.type == "cpu" and q_butd.shape[2] <= BLOCKED_LENGTH
    return short and mask.causal and (combine is not None or q_butd.dtype == torch.bfloat16)


def eager_attention(
    q_butd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    scale: float,
    combine: Combine | None,
    dropout: float,
    block: int,
    observation: Observation | None,
) -> Tensor:
    """Attention step by step, for `block` queries at a time; a recording takes them all at once."""
    k_busd = _repeat(k_bgsd, q_butd.shape[1])
    queries = q_butd.shape[2]
    parts = []
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        seen = slice(0, rows.stop if mask.causal else k_busd.shape[2])
        scores_buts = _scores(q_butd[:, :, rows], k_busd[:, :, seen], scale)
        maps_buts = masked_softmax(scores_buts, mask.rows(rows))
        weights_bhts = maps_buts if combine is None else combine(maps_buts, rows)
        v_bhse = _repeat(v_bgse, weights_bhts.shape[1])
        parts.append(F.dropout(weights_bhts, dropout).to(v_bhse.dtype) @ v_bhse[:, :, seen])
        if observation is not None:
            observation.q, observation.k, observation.v = q_butd, k_busd, v_bhse
            observation.scores, observation.maps, observation.weights = scores_buts, maps_buts, weights_bhts
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _repeat(x_bgsd: Tensor, heads: int) -> Tensor:
    """One key or value head per query head."""
    repeats = heads // x_bgsd.shape[1]
    return x_bgsd if repeats == 1 else x_bgsd.repeat_interleave(repeats, dim=1)


def _scores(q_butd: Tensor, k_busd: Tensor, scale: float) -> Tensor:
    """scale · q kᵀ, in fp32 or finer from here on."""
    fine = torch.promote_types(q_butd.dtype, torch.float32)
    return (q_butd @ k_busd.transpose(-2, -1)).to(fine) * scale


def masked_softmax(scores_buts: Tensor, mask: Mask) -> Tensor:
    """Softmax over the visible keys; rows that see nothing are all 0. With a causal mask the last query sees all."""
    hidden: Tensor | None = None
    if mask.allowed_b1ts is not None:
        hidden = ~mask.allowed_b1ts
    elif mask.causal:
        t, s = scores_buts.shape[-2:]
        hidden = torch.ones(t, s, dtype=torch.bool, device=scores_buts.device).triu(1 + s - t)
    if hidden is not None:
        scores_buts = scores_buts.masked_fill(hidden, -torch.inf)
    return mask.clear_empty(scores_buts.softmax(dim=-1))


def fused_attention(
    q_butd: Tensor, k_bgsd: Tensor, v_bgse: Tensor, mask: Mask, scale: float, dropout: float
) -> Tensor:
    """Outputs [b, u, t, e] of every sub-head through torch's fused kernels."""
    channels, wanted = q_butd.shape[-1], v_bgse.shape[-1]
    if wanted > channels and q_butd.device.type == "cpu":
        q_butd = F.pad(q_butd, (0, wanted - channels))
        k_bgsd = F.pad(k_bgsd, (0, wanted - channels))
    out_bute = F.scaled_dot_product_attention(
        q_butd,
        k_bgsd,
        v_bgse,
        attn_mask=mask.additive(q_butd.dtype),
        dropout_p=dropout,
        is_causal=mask.causal and mask.allowed_b1ts is None,
        scale=scale,
        enable_gqa=q_butd.shape[1] != k_bgsd.shape[1],
    )
    return mask.clear_empty(out_bute)
