"""Attention of one new token per row: explicit maps of one query, read straight from the decoding state.

    scores = scale · q kᵀ + bias,   maps = softmax(scores over visible keys),   out = (maps, or their difference) · v

One query has a map of s numbers, so there is nothing to save by fusing. What counts is that keys and values are read once and
never copied: heads that share a key (or value) head become rows of one product, and two maps are subtracted before the values
are read.

Shapes: b batch · u query sub-heads · h heads · g key heads, or value heads · r sub-heads (heads) per key (value) head · s keys ·
d key channels · e value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.nn.attention.bias import ScoreBias
from torchstone.nn.attention.difference import Difference
from torchstone.nn.attention.mask import Mask


def step_attention(
    q_bu1d: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    scale: float,
    difference: Difference | None,
    bias: ScoreBias | None,
) -> Tensor:
    """Outputs [b, h, 1, e]; arguments as of `nn.attention.core.attend`, with one query."""
    fine = torch.promote_types(q_bu1d.dtype, torch.float32)
    q_bgrd = (q_bu1d * scale).unflatten(1, (k_bgsd.shape[1], -1)).flatten(2, 3)
    scores_bu1s = (q_bgrd @ k_bgsd.transpose(-2, -1)).to(fine).flatten(1, 2).unsqueeze(2)
    if bias is not None:
        whole = bias.whole()
        scores_bu1s = scores_bu1s + (whole if difference is None else difference.share(whole))
    if mask.allowed_b1ts is not None:
        scores_bu1s = scores_bu1s.masked_fill(~mask.allowed_b1ts, -torch.inf)
    maps_bu1s = scores_bu1s.softmax(dim=-1)
    weights_bh1s = maps_bu1s if difference is None else difference.subtract(maps_bu1s)
    weights_bgrs = weights_bh1s.to(v_bgse.dtype).unflatten(1, (v_bgse.shape[1], -1)).flatten(2, 3)
    out_bh1e = (weights_bgrs @ v_bgse).flatten(1, 2).unsqueeze(2)
    return mask.clear_empty(out_bh1e)
