"""BuildContext: what a part may know of the model around it when it is built.

A part's own settings are in its configuration; everything it needs from outside (the model's width, which layer it
sits in, how dense maps are made) arrives here, so that the same configuration serves every layer and every width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from torchstone.recipe.part import Part

Use = Literal["input", "output", "feedforward"]
"""What a dense map is for: it reads the residual stream into a mixer, writes a mixer's result, or is part of a feed-forward."""


@dataclass(frozen=True)
class BuildContext:
    """Sizes of the model and the place of the part in it.

    Attributes:
        width: channels of the residual stream (d in `x_btd`).
        head_dim: channels of one attention head, from which mixers without an explicit head count derive theirs.
        depth: number of blocks.
        layer: 0-based index of the block that the part belongs to; 0 for parts outside the blocks.
        vocab_size: number of token ids.
        length: sequence length of training, in tokens.
        projection: the part that makes dense maps; None makes plain linear layers.
        shared: where modules are kept that several layers share; see `share`.
    """

    width: int
    head_dim: int
    depth: int
    layer: int
    vocab_size: int
    length: int
    projection: Part | None = None
    shared: nn.ModuleDict | None = None

    def linear(self, inputs: int, outputs: int, use: Use, bias: bool = False) -> Any:
        """A dense map from `inputs` to `outputs` channels, of the model's projection part."""
        if self.projection is None:
            return nn.Linear(inputs, outputs, bias=bias)
        return self.projection.build(self, inputs, outputs, use, bias)  # type: ignore[attr-defined]

    def share(self, name: str, make: Callable[[], nn.Module]) -> Any:
        """The module of this name that all layers of the model share, made by the first layer that asks.

        It is registered in the model as `shared.<name>`. A layer keeps it in a tuple, so that it is no submodule of the layer.
        Outside a model each call makes a module of its own.
        """
        if self.shared is None:
            return make()
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]
