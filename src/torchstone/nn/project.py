"""Several projections of one input in one matrix product.

Shapes: b batch · t tokens · d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(x_btd: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """The outputs of bias-free linear layers, computed together.

    The weights stay separate parameters (so that names, initialisation and matching arms stay simple) and are put
    side by side for the product: one large product runs faster than several small ones, and so does its gradient.
    """
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x_btd, weight).split([layer.out_features for layer in layers], dim=-1)
