"""Activations that are not finite are an error with a place, never a number in an average.

Shapes: b batch · h heads · t tokens · c channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchstone.errors import DataError


def require_finite(layer: int, name: str, tensors_bhtc: Mapping[str, Tensor]) -> None:
    """Raise where a value of [b, h, t, c] is NaN or infinite.

    Args:
        layer, name: the attention layer, by number and by module path.
        tensors_bhtc: what each tensor is called, and the tensor.

    Raises:
        DataError: names the layer, the tensor, and row, token and head of the earliest such value.
    """
    for what, tensor_bhtc in tensors_bhtc.items():
        finite_bht = tensor_bhtc.isfinite().all(-1)
        if bool(finite_bht.all()):
            continue
        row, head, token = (int(i) for i in _earliest(~finite_bht))
        raise DataError(
            f"layer {layer} ({name}) has {what} that are not finite, first at token {token} of row {row}, head {head} "
            "(all counted from 0); load the model in float32, or look for damaged weights in this layer or before it."
        )


def _earliest(bad_bht: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and token of the bad value with the smallest token number."""
    found_n3 = bad_bht.nonzero()
    row, head, token = found_n3[torch.argmin(found_n3[:, 2])]
    return row, head, token
