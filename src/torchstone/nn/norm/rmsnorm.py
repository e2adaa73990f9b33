"""RMSNorm: divide by the root mean square of the channels, times a learned gain (Zhang and Sennrich, arXiv 1910.07467).

    y = g · x / √(mean(x²) + ε)

Pitfall: the statistics are computed in fp32 (fp64 for fp64 input), because the sum of squares loses half its digits in
bf16; the result has the input's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.recipe.part import Part


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x with unit root mean square over its last dimension, times `gain` of that size; in the type of x."""
    fine = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(fine), gain.shape, gain.to(fine), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalises the last dimension, of size `channels`."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x with unit root mean square over its last dimension, times the gain."""
        return rms_norm(x, self.gain, self.eps)

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """The gain starts at one."""
        return {"gain": lambda gain, generator: gain.fill_(1.0)}

    def no_decay_parameters(self) -> tuple[str, ...]:
        """Gains are not decayed."""
        return ("gain",)

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        return f"{self.gain.shape[0]}, eps={self.eps:g}"


class RMSNormConfig(Part):
    """`norm: rmsnorm`."""

    family: ClassVar[str] = "norm"
    kind: Literal["rmsnorm"] = "rmsnorm"
    eps: float = Field(default=1e-6, gt=0, description="added to the mean square")

    def build(self, context: BuildContext) -> RMSNorm:
        """A norm over the model's width."""
        return RMSNorm(context.width, self.eps)
