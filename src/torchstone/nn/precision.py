"""Fine: modules whose parameters stay in fp32 when the model is converted to half precision.

Moves between devices and a conversion to fp64 follow the model; bf16 and fp16 do not reach the parameters, because a
few scalars decide over every score or every head, and rounding them is a change of the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Fine(nn.Module):
    """Base of modules that keep their own parameters and their children's in fp32 or finer."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: parameter.detach() for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize < torch.float32.itemsize:
                parameter.data = before[name].to(parameter.device)
        return self
