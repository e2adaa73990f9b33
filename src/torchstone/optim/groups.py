"""Parameter groups: which parameters are decayed, by declared rules.

Weight decay pulls matrices towards zero. It is not meant for gains, biases and other vectors, nor for parameters whose
zero is not neutral; a module names those in `no_decay_parameters()`. Rules are predicates over a parameter's name and
value; every trainable parameter must match exactly one, so that none is forgotten and none is updated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchstone.errors import ConfigError

Rule = Callable[[str, nn.Parameter], bool]


def decay_rules(model: nn.Module) -> dict[str, Rule]:
    """`decay`: matrices. `no_decay`: vectors, scalars, and what modules exempt in `no_decay_parameters()`.

    Raises:
        ConfigError: a module exempts a parameter that it does not have.
    """
    exempt = {
        f"{prefix}.{local}" if prefix else local
        for prefix, module in model.named_modules()
        for local in getattr(module, "no_decay_parameters", tuple)()
    }
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if unknown := sorted(exempt - known):
        raise ConfigError(
            f"no_decay_parameters names {', '.join(unknown)}, which the model does not have; correct the module "
            "that says so."
        )
    shared = {id(value) for name, value in model.named_parameters(remove_duplicate=False) if name in exempt}

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and id(parameter) not in shared

    return {"decay": decays, "no_decay": lambda name, parameter: not decays(name, parameter)}


def split_parameters(model: nn.Module, rules: Mapping[str, Rule]) -> dict[str, list[nn.Parameter]]:
    """The model's trainable parameters by the rule that each matches, in the model's order.

    Raises:
        ConfigError: a parameter matches no rule or several, or the model has nothing to train.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rules}
    problems = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matching = [group for group, rule in rules.items() if rule(name, parameter)]
        if len(matching) == 1:
            groups[matching[0]].append(parameter)
        else:
            problems.append(f"{name} (in {' and '.join(matching) or 'no group'})")
    if problems:
        raise ConfigError(
            f"every parameter belongs to exactly one optimizer group, and these do not: {', '.join(problems[:5])}; "
            f"the groups are {', '.join(rules)}: mend their rules."
        )
    if not any(groups.values()):
        raise ConfigError("the model has no trainable parameter; unfreeze some, or evaluate it instead of training.")
    return groups


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What a torch optimizer takes: the groups of `decay_rules` with their decay, empty ones left out.

    Raises:
        ConfigError: see `decay_rules` and `split_parameters`.
    """
    decays = {"decay": weight_decay, "no_decay": 0.0}
    groups = split_parameters(model, decay_rules(model))
    return [{"params": found, "weight_decay": decays[name]} for name, found in groups.items() if found]
