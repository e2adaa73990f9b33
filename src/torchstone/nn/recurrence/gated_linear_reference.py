"""Gated linear attention by its definition, one token after the other: what the fast forms are tested against.

    S_t = diag(exp g_t) S_{t−1} + k_tᵀ v_t,   o_t = s · q_t S_t

Shapes: b batch · t tokens · h heads · k key channels · v value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_gated_linear_attention(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor | None = None,
    scale: float | None = None,
    starts_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [b, t, h, v] and the last state [b, h, k, v]; arguments as in `gated_linear_attention`."""
    b, t, h, keys = q_bthk.shape
    scale = keys**-0.5 if scale is None else scale
    if state_bhkv is None:
        state_bhkv = v_bthv.new_zeros(b, h, keys, v_bthv.shape[-1])
    outputs = []
    for step in range(t):
        if starts_bt is not None:
            state_bhkv = torch.where(starts_bt[:, step, None, None, None], 0.0, state_bhkv)
        decayed_bhkv = g_bthk[:, step].exp()[..., None] * state_bhkv
        state_bhkv = decayed_bhkv + torch.einsum("bhk,bhv->bhkv", k_bthk[:, step], v_bthv[:, step])
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_bthk[:, step], state_bhkv))
    return torch.stack(outputs, dim=1), state_bhkv
