"""Adaptive temperature: sharpen attention maps that are too flat, at inference (arXiv 2410.01104, section 5).

    H = −Σ p ln p of p = softmax(z);   β = max(1, −0.037H⁴ + 0.481H³ − 2.3H² + 4.917H − 1.791) where H > 0.5, else 1
    p′ = softmax(β z)

Logits of bounded size must spread over more keys as the context grows, so the entropy of a map grows with its length.
The polynomial, fitted by the authors, maps the entropy of a map to the inverse temperature β ≥ 1 that would have been
right for it.

Shapes: … any leading dimensions · s keys. A map p serves as well as its logits: softmax(β ln p) is the same.

Pitfall: 1e-9 inside the logarithm, as in the authors' code, makes the entropy of a one-hot map about −1e-9.
"""

from __future__ import annotations

import torch
from torch import Tensor

POLYNOMIAL = (-0.037, 0.481, -2.3, 4.917, -1.791)
THRESHOLD = 0.5


def attention_entropy(maps_s: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; signed weights are first made a distribution, |a| / Σ|a|."""
    magnitude_s = maps_s.float().abs()
    total = magnitude_s.sum(dim=-1, keepdim=True)
    share_s = magnitude_s / total.clamp_min(torch.finfo(torch.float32).tiny)
    return -(share_s * (share_s + 1e-9).log()).sum(dim=-1)


def inverse_temperature(entropy: Tensor) -> Tensor:
    """β of maps with this entropy: 1 or more."""
    beta = torch.zeros_like(entropy)
    for coefficient in POLYNOMIAL:
        beta = beta * entropy + coefficient
    return torch.where(entropy > THRESHOLD, beta.clamp_min(1.0), torch.ones_like(entropy))


def adaptive_softmax(scores_s: Tensor) -> Tensor:
    """Softmax over the last dimension at a temperature chosen by its own entropy; −inf stays invisible.

    A row of −inf alone gives zeros.
    """
    visible = (scores_s > -torch.inf).any(dim=-1, keepdim=True)
    scores_s = scores_s.float().masked_fill(~visible, 0.0)
    beta = inverse_temperature(attention_entropy(scores_s.softmax(dim=-1)))
    return (scores_s * beta[..., None]).softmax(dim=-1).masked_fill(~visible, 0.0)
