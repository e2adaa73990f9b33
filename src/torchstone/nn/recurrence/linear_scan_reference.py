"""The linear scan as its definition says, for tests: a Python loop that autograd records.

Shapes: b batch · t time · d channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan_reference(a_btd: Tensor, b_btd: Tensor, initial_bd: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All states h_t = a_t h_{t−1} + b_t, [b, t, d], and the last one, [b, d]."""
    h_bd = torch.zeros_like(b_btd[:, 0]) if initial_bd is None else initial_bd
    states = []
    for a_bd, b_bd in zip(a_btd.unbind(1), b_btd.unbind(1), strict=True):
        h_bd = a_bd * h_bd + b_bd
        states.append(h_bd)
    return torch.stack(states, dim=1), h_bd
