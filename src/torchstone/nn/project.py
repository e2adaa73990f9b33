"""Several dense maps of one input together, and what a module says of the maps inside it.

A dense map is what `BuildContext.linear` makes: an `nn.Linear`, or another projection part with `in_features`, `out_features`
and `flops()`.

Shapes: b batch · t tokens · d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.nn.roles import Role, Roles

FEW_TOKENS = 8  # up to here, putting weights side by side costs more than the products themselves

Arrange = Callable[[Tensor], Tensor]
"""Reorders the rows of a weight [out, in] (or of a bias [out]): the outputs of a map."""


def project(x_btd: Tensor, *layers: nn.Module, arrange: Sequence[Arrange | None] = ()) -> tuple[Tensor, ...]:
    """Outputs [b, t, out] of every layer, plain linear ones computed together.

    Their weights stay separate parameters (so that names, initialisation and paired arms stay simple) and are put side by side
    for the product: one large product runs faster than several small ones, and so does its gradient. For a few tokens, as in
    decoding, the copy of the weights would cost more.

    Args:
        layers: dense maps of the same input.
        arrange: for each layer the order of its outputs, or None to leave it; () leaves all.
    """
    orders = tuple(arrange) or (None,) * len(layers)
    few = math.prod(x_btd.shape[:-1]) <= FEW_TOKENS
    if few or not all(type(layer) is nn.Linear for layer in layers):
        outputs = [layer(x_btd) for layer in layers]
        return tuple(y if order is None else _reorder(order, y) for y, order in zip(outputs, orders, strict=True))
    plain: list[Any] = list(layers)
    weights = [
        layer.weight if order is None else order(layer.weight) for layer, order in zip(plain, orders, strict=True)
    ]
    sizes = [weight.shape[0] for weight in weights]
    return F.linear(x_btd, torch.cat(weights), _biases(plain, orders)).split(sizes, dim=-1)


def _reorder(order: Arrange, y_bto: Tensor) -> Tensor:
    return order(y_bto.movedim(-1, 0)).movedim(0, -1)


def _biases(layers: Sequence[nn.Linear], orders: Sequence[Arrange | None]) -> Tensor | None:
    """All biases side by side, zeros where a layer has none; None where no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    found = []
    for layer, order in zip(layers, orders, strict=True):
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        found.append(bias if order is None else order(bias))
    return torch.cat(found)


def layer_flops(layer: Any) -> float:
    """Forward FLOPs per token of a dense map."""
    return 2.0 * layer.weight.numel() if type(layer) is nn.Linear else float(layer.flops())


def matrices(parent: nn.Module, *names: str) -> tuple[str, ...]:
    """Local names of the matrices inside the parent's dense maps `names`: ("w_o.weight",) for a linear one."""
    return tuple(
        f"{name}.{local}"
        for name in names
        for local, value in parent.get_submodule(name).named_parameters()
        if value.dim() >= 2
    )


def roles(parent: nn.Module, given: Mapping[str, Role]) -> Roles:
    """The role of every matrix inside the parent's dense maps, from each map's role."""
    return {name: role for layer, role in given.items() for name in matrices(parent, layer)}
