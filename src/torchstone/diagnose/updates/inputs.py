"""A few rows of what each linear layer reads, taken from forward passes that happen anyway.

Hooks sit on the layers only while rows are wanted, so that other steps run as if there were none. A layer keeps rows
of its first call with gradients (evaluations in between are not looked at, nor is the first pass of a checkpointed
block), evenly spread over the batch; the later micro-batches of an update add nothing.

Linear layers are `nn.Linear` and what derives from it, `GainedLinear` (its product before the gain), and
transformers' `Conv1D`, whose weight is stored [in, out].

Shapes: n rows · i inputs.

Pitfalls: a compiled module does not call hooks that came after compiling; run it uncompiled for a probe
(`capturing`). A matrix that is used outside its layer's forward pass, such as the output matrix in a chunked loss,
has no rows. Rows of padding count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchstone.nn.projection.gained import GainedLinear


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer stores its weight [in, out], as transformers' Conv1D does."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def linear_layers(model: nn.Module, weights: Iterable[Tensor]) -> dict[int, nn.Module]:
    """The identity of each of some weights that a linear layer holds, and the first layer that holds it."""
    found: dict[int, nn.Module] = {}
    wanted = set(map(id, weights))
    for layer in model.modules():
        if isinstance(layer, nn.Linear | GainedLinear) or is_transposed(layer):
            found.setdefault(id(layer.weight), layer)
    return {key: layer for key, layer in found.items() if key in wanted}


def fusing_modules(model: nn.Module, layers: dict[int, nn.Module]) -> dict[int, nn.Module]:
    """The module of this package around each layer, whose input is the layer's where maps are computed together."""
    around = {id(child): module for module in model.modules() for child in module.children()}
    found = {key: around.get(id(layer), layer) for key, layer in layers.items()}
    return {key: module for key, module in found.items() if type(module).__module__.startswith("torchstone.")}


class LayerInputs:
    """Rows of the inputs of some linear layers.

    Args:
        model: that holds them.
        layers: as `linear_layers` gives them, or some of those.
        rows: most rows of a layer.
    """

    def __init__(self, model: nn.Module, layers: dict[int, nn.Module], rows: int) -> None:
        self.layers, self.fusing, self.rows = layers, fusing_modules(model, layers), rows
        self._kept: dict[nn.Module, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._probing = False

    def begin(self) -> None:
        """Keep rows from now on."""
        if not self._handles:
            modules = dict.fromkeys([*self.layers.values(), *self.fusing.values()])
            self._handles = [module.register_forward_pre_hook(self._keep, with_kwargs=True) for module in modules]

    def end(self) -> None:
        """Take the hooks off; the rows stay until `clear`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Forget the rows."""
        self._kept = {}

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside, passes without gradients are looked at too."""
        self.begin()
        self._probing = True
        try:
            yield
        finally:
            self._probing = False
            self.end()

    def of(self, weight: Tensor) -> Tensor | None:
        """Rows [n, i] that the layer of this weight read; None if it was not called."""
        layer = self.layers.get(id(weight))
        if layer is None or layer in self._kept:
            return None if layer is None else self._kept[layer]
        rows_ni = self._kept.get(self.fusing.get(id(weight), layer))
        return rows_ni if rows_ni is not None and rows_ni.shape[1] == weight.shape[1] else None

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = next(iter((*arguments, *keywords.values())), None)
        if module in self._kept or not isinstance(given, Tensor) or not (self._probing or torch.is_grad_enabled()):
            return
        inputs_ni = given.detach().flatten(0, -2)
        if len(inputs_ni):
            count = min(self.rows, len(inputs_ni))
            places = torch.linspace(0, len(inputs_ni) - 1, count, dtype=torch.float64, device=inputs_ni.device)
            self._kept[module] = inputs_ni[places.round().long()]
