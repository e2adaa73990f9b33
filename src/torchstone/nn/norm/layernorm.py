"""LayerNorm: subtract the mean of the channels and divide by their standard deviation (Ba et al., arXiv 1607.06450).

    y = g · (x − mean(x)) / √(var(x) + ε) + b

`scale` and `bias` say whether the gain g and the bias b are learned; without them they are 1 and 0 (TokenFormer).

Pitfall: the statistics are computed in fp32 (fp64 for fp64 input), because a variance of large values loses its digits in
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


class LayerNorm(nn.Module):
    """Normalises the last dimension, of size `channels`."""

    def __init__(self, channels: int, eps: float, scale: bool, bias: bool) -> None:
        super().__init__()
        self.channels, self.eps = channels, eps
        self.gain = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x with mean 0 and variance 1 over its last dimension, times the gain, plus the bias; in the type of x."""
        fine = torch.promote_types(x.dtype, torch.float32)
        gain = None if self.gain is None else self.gain.to(fine)
        bias = None if self.bias is None else self.bias.to(fine)
        return F.layer_norm(x.to(fine), (self.channels,), gain, bias, self.eps).to(x.dtype)

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """The gain starts at one (the bias, as every bias, at zero)."""
        return {} if self.gain is None else {"gain": lambda gain, generator: gain.fill_(1.0)}

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        learned = [name for name in ("gain", "bias") if getattr(self, name) is not None]
        return f"{self.channels}, eps={self.eps:g}, learned: {', '.join(learned) or 'nothing'}"


class LayerNormConfig(Part):
    """`norm: layernorm`."""

    family: ClassVar[str] = "norm"
    kind: Literal["layernorm"] = "layernorm"
    eps: float = Field(default=1e-5, gt=0, description="added to the variance")
    scale: bool = Field(default=True, description="learn a gain per channel")
    bias: bool = Field(default=True, description="learn a bias per channel")

    def build(self, context: BuildContext) -> LayerNorm:
        """A norm over the model's width."""
        return LayerNorm(context.width, self.eps, self.scale, self.bias)
