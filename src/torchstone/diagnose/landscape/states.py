"""Weights as mappings of tensors: mixing them, their differences, and putting them into a model for a while.

A state is what `state_dict()` of a module gives. Floating tensors (weights and buffers) take part in arithmetic; integer and
bool tensors (counters, masks) do not.

Pitfall: tied weights have several names in a state dict and so count several times in a norm; `parameters_of` and `own_names`
have each once. A state that goes back into a model needs all names: `with_ties`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError

State = Mapping[str, Tensor]


def state_of(source: nn.Module | State) -> dict[str, Tensor]:
    """A copy of a module's or mapping's tensors, detached."""
    given = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: value.detach().clone() for name, value in given.items()}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, each once, detached copies."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def own_names(model: nn.Module) -> tuple[str, ...]:
    """The names of floating parameters, each parameter once, under the first name that it has."""
    return tuple(name for name, value in model.named_parameters() if value.is_floating_point())


def with_ties(model: nn.Module, direction: State) -> dict[str, Tensor]:
    """A direction of parameters, with the same tensor under every other name that a tied parameter has in the model."""
    first = {id(value): name for name, value in model.named_parameters()}
    names = ((name, first[id(value)]) for name, value in model.named_parameters(remove_duplicate=False))
    return {name: direction[known] for name, known in names if known in direction}


def require_alike(a: State, b: State) -> None:
    """Raise ConfigError unless two states have the same names and shapes."""
    problems = [f"{name} is in one of them only" for name in sorted(set(a) ^ set(b))]
    problems += [
        f"{name} is {list(a[name].shape)} in one and {list(b[name].shape)} in the other"
        for name in a
        if name in b and a[name].shape != b[name].shape
    ]
    if problems:
        raise ConfigError(
            f"the two sets of weights are not of one architecture: {'; '.join(problems[:3])}. Give checkpoints of models "
            "with equal recipes."
        )


def blend(a: State, b: State, alpha: float) -> dict[str, Tensor]:
    """(1 − α) · a + α · b for floating tensors, a's own for the others; exactly a at 0 and b at 1.

    Tensors narrower than fp32 are blended in fp32 and rounded once.
    """
    return {name: _blended(value, b[name], alpha) for name, value in a.items()}


def _blended(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if not a.is_floating_point():
        return a
    if alpha in (0.0, 1.0):
        return a if alpha == 0.0 else b.to(a)
    wide = torch.promote_types(a.dtype, torch.float32)
    return ((1 - alpha) * a.to(wide) + alpha * b.to(a.device, wide)).to(a.dtype)


def difference(later: State, earlier: State) -> dict[str, Tensor]:
    """later − earlier, floating tensors only, in fp32 or wider.

    Raises:
        ConfigError: the states are not of one architecture.
    """
    require_alike(later, earlier)
    return {
        name: value.to(torch.promote_types(value.dtype, torch.float32)) - earlier[name].to(value.device)
        for name, value in later.items()
        if value.is_floating_point()
    }


def moved(origin: State, direction: State, distance: float) -> dict[str, Tensor]:
    """origin + distance · direction; tensors that the direction lacks stay."""
    return {
        name: (value + distance * direction[name].to(value.device)).to(value.dtype) if name in direction else value
        for name, value in origin.items()
    }


@contextmanager
def holding(model: nn.Module, state: State) -> Iterator[nn.Module]:
    """Inside, the model has the weights of `state`; afterwards its own again.

    Raises:
        ConfigError: they are not of the model's architecture.
    """
    own = state_of(model)
    require_alike(own, state)
    try:
        model.load_state_dict(dict(state))
        yield model
    finally:
        model.load_state_dict(own)
