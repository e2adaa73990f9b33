"""Several projections of one input in one matrix product.

Shapes: b batch · t tokens · d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project(x_btd: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x Wᵀ for every weight [out, d], computed together.

    The weights stay separate parameters (so that names, initialisation and paired arms stay simple) and are put side
    by side for the product: one large product runs faster than several small ones, and so does its gradient.
    """
    sizes = [weight.shape[0] for weight in weights]
    return F.linear(x_btd, torch.cat(weights)).split(sizes, dim=-1)
