"""Fine: modules whose parameters stay in fp32 when the model is converted to half precision.

Moves between devices and a conversion to fp64 follow the model; bf16 and fp16 do not reach the parameters, because a
few scalars decide over every score or every head, and rounding them is a change of the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Fine(nn.Module):
    """Base of modules that keep their own parameters and their children's in fp32 or finer."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with kept_fine(self, [name for name, _ in self.named_parameters()]):
            return super()._apply(fn, recurse)


@contextmanager
def kept_fine(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Undo, for these parameters and their gradients, a conversion to half precision that happens inside."""
    before = {}
    for name in names:
        parameter = module.get_parameter(name)
        before[name] = parameter.detach(), None if parameter.grad is None else parameter.grad.detach()
    yield
    for name, (value, grad) in before.items():
        parameter = module.get_parameter(name)
        if parameter.dtype.itemsize < torch.float32.itemsize:
            parameter.data = value.to(parameter.device)
            parameter.grad = None if grad is None else grad.to(parameter.device)
