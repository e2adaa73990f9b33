"""Scaled dot-product attention, twice: one eager core that shows every step, and the fast kernels.

    scores = scale · q kᵀ,   maps = softmax(scores over visible keys),   out = maps · v          (Vaswani et al. 2017)

Shapes: b batch · h query heads · g key heads (g divides h) · t queries · s keys · d key channels · e value channels.

`eager_attention` is the meaning, and what runs when a model is observed (`nn.attention.observe`): each step is one
line whose result is recorded. `fast_attention` is the same function through torch's fused kernels, which never hold a
map. Both take the same arguments, so a mixer calls `attend` and does not choose.

Pitfalls: the softmax is in fp32 whatever the inputs; dropout acts on maps, in training only; e may differ from d
(differential attention), which no fused CPU kernel accepts, so q and k are then padded with zero channels, which
leaves the scores as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.nn.attention.mask import Mask
from torchstone.nn.attention.observe import Observation


def attend(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    *,
    scale: float,
    dropout: float = 0.0,
    observation: Observation | None = None,
) -> Tensor:
    """Attention outputs [b, h, t, e]; query head i reads key head i // (h/g).

    Args:
        mask: visibility, from `parallel_mask` or `step_mask`.
        scale: factor of the scores, usually 1/√d.
        dropout: probability of dropping a map entry in this call (0 outside training).
        observation: filled, through the eager core, when given.
    """
    if observation is not None:
        return eager_attention(q_bhtd, k_bgsd, v_bgse, mask, scale, dropout, observation)
    return fast_attention(q_bhtd, k_bgsd, v_bgse, mask, scale, dropout)


def eager_attention(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgse: Tensor,
    mask: Mask,
    scale: float,
    dropout: float,
    observation: Observation,
) -> Tensor:
    """Attention step by step; records q, k, v, scores and maps."""
    repeat = q_bhtd.shape[1] // k_bgsd.shape[1]
    k_bhsd = k_bgsd.repeat_interleave(repeat, dim=1)
    v_bhse = v_bgse.repeat_interleave(repeat, dim=1)
    fine = torch.promote_types(q_bhtd.dtype, torch.float32)
    scores_bhts = (q_bhtd @ k_bhsd.transpose(-2, -1)).to(fine) * scale
    maps_bhts = masked_softmax(scores_bhts, mask)
    observation.q, observation.k, observation.v = q_bhtd, k_bhsd, v_bhse
    observation.scores, observation.maps, observation.weights = scores_bhts, maps_bhts, maps_bhts
    return F.dropout(maps_bhts, dropout).to(v_bhse.dtype) @ v_bhse


def masked_softmax(scores_bhts: Tensor, mask: Mask) -> Tensor:
    """Softmax over the visible keys; rows that see nothing are all 0."""
    if mask.causal:
        t, s = scores_bhts.shape[-2:]
        future = torch.ones(t, s, dtype=torch.bool, device=scores_bhts.device).triu(1)
        scores_bhts = scores_bhts.masked_fill(future, -torch.inf)
    elif mask.allowed_b1ts is not None:
        scores_bhts = scores_bhts.masked_fill(~mask.allowed_b1ts, -torch.inf)
    return mask.clear_empty(scores_bhts.softmax(dim=-1))


def fast_attention(
    q_bhtd: Tensor, k_bgsd: Tensor, v_bgse: Tensor, mask: Mask, scale: float, dropout: float
) -> Tensor:
    """Attention through torch's fused kernels."""
    channels, wanted = q_bhtd.shape[-1], v_bgse.shape[-1]
    if wanted > channels and q_bhtd.device.type == "cpu":
        q_bhtd = F.pad(q_bhtd, (0, wanted - channels))
        k_bgsd = F.pad(k_bgsd, (0, wanted - channels))
    out_bhte = F.scaled_dot_product_attention(
        q_bhtd,
        k_bgsd,
        v_bgse,
        attn_mask=mask.additive(q_bhtd.dtype),
        dropout_p=dropout,
        is_causal=mask.causal,
        scale=scale,
        enable_gqa=q_bhtd.shape[1] != k_bgsd.shape[1],
    )
    return mask.clear_empty(out_bhte)
