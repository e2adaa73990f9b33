"""Linear projection: y = W x (+ b), the dense map that mixers and feed-forward layers are usually made of."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from torchstone.nn.context import BuildContext, Use
from torchstone.recipe.part import Part


class LinearProjectionConfig(Part):
    """`projection: linear`."""

    family: ClassVar[str] = "projection"
    kind: Literal["linear"] = "linear"

    def build(self, context: BuildContext, inputs: int, outputs: int, use: Use, bias: bool) -> nn.Linear:
        """The layer."""
        return nn.Linear(inputs, outputs, bias=bias)
