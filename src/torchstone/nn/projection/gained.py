"""Linear projection with a learned gain for every output: y = gain ⊙ (W x) (+ b).

A rotational optimizer (`optim.rotational`) keeps the norm of every row of W where it began, so that a model under it cannot make
a layer's output larger or smaller. The gain gives that freedom back, as in the GPT runs of Kosson et al. (arXiv 2305.17212). It
starts at 1, where the layer is the linear one of the same weights.

Shapes: d inputs · e outputs; leading dimensions are free.

Pitfalls: gain and row norm are one degree of freedom under an ordinary optimizer, where weight decay of W then costs nothing. The
gain is a vector: it is neither decayed nor rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.nn.context import BuildContext, Use
from torchstone.recipe.part import Part


class GainedLinear(nn.Module):
    """A dense map whose outputs have learned gains.

    Args:
        inputs, outputs: channels.
        bias: add a learned vector after the gain.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.gain = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_d: Tensor) -> Tensor:
        """[…, d] → […, e]."""
        y_e = F.linear(x_d, self.weight)
        y_e = y_e * self.gain.to(y_e.dtype)
        return y_e if self.bias is None else y_e + self.bias.to(y_e.dtype)

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """Gains of 1; the weight is drawn as that of a linear layer."""
        return {"gain": lambda value, generator: value.fill_(1.0)}

    def flops(self) -> float:
        """Forward FLOPs per token of the product."""
        return 2.0 * self.weight.numel()

    def activation_values(self) -> int:
        """Values per token kept for the backward pass: input, output before the gain, output."""
        return self.in_features + 2 * self.out_features

    def extra_repr(self) -> str:
        """Sizes, for printing the model."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class GainedLinearConfig(Part):
    """`projection: gained`."""

    family: ClassVar[str] = "projection"
    kind: Literal["gained"] = "gained"

    def build(self, context: BuildContext, inputs: int, outputs: int, use: Use, bias: bool) -> GainedLinear:
        """The layer."""
        return GainedLinear(inputs, outputs, bias)
