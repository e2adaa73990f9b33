"""Parameter groups: which parameters are decayed, by a declared rule.

Weight decay pulls matrices towards zero. It is not meant for gains, biases and other vectors, nor for parameters whose
zero is not neutral; a module names those in `no_decay_parameters()`. Every trainable parameter belongs to exactly one
group, else building the optimizer is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torchstone.errors import ConfigError


@dataclass(frozen=True)
class Groups:
    """Names of trainable parameters, in the model's order."""

    decay: tuple[str, ...]
    no_decay: tuple[str, ...]


def exempt_names(model: nn.Module) -> set[str]:
    """Full names of parameters that their modules exempt from decay."""
    return {
        f"{prefix}.{local}" if prefix else local
        for prefix, module in model.named_modules()
        for local in getattr(module, "no_decay_parameters", tuple)()
    }


def split_parameters(model: nn.Module) -> Groups:
    """Matrices decay; vectors, scalars and exempt parameters do not.

    Raises:
        ConfigError: a module exempts a parameter that it does not have, or the model has nothing to train.
    """
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    exempt = exempt_names(model)
    unknown = exempt - set(names)
    if unknown:
        raise ConfigError(f"no_decay_parameters names parameters that do not exist: {', '.join(sorted(unknown))}.")
    if not names:
        raise ConfigError("the model has no trainable parameter.")
    decay = tuple(name for name, parameter in names.items() if parameter.dim() >= 2 and name not in exempt)
    return Groups(decay, tuple(name for name in names if name not in set(decay)))
