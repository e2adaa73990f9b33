"""Parameter groups: which parameters are decayed how strongly, by declared rules.

Weight decay pulls matrices towards zero. It is not meant for gains, biases and other vectors, nor for parameters whose
zero is not neutral; a module names those in `no_decay_parameters()`. Where decay differs by role, every matrix needs a
role, which its module gives in `parameter_roles()` (see `torchstone.nn.roles`). Rules are predicates over a parameter's name
and value; every trainable parameter must match exactly one, so that none is forgotten and none is updated twice. A tensor
of several names (tied embeddings) is one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from torchstone.errors import ConfigError
from torchstone.nn.roles import Role
from torchstone.optim.weight_decay import WeightDecay

Rule = Callable[[str, nn.Parameter], bool]
ROLES: tuple[str, ...] = get_args(Role)
NO_DECAY = "no_decay"


@dataclass(frozen=True, eq=False)
class DecayGroup:
    """Parameters by name that share a decay; `name` is a role, `decay` (all matrices) or `no_decay`."""

    name: str
    weight_decay: float
    parameters: Mapping[str, nn.Parameter]

    @property
    def count(self) -> int:
        """Number of values."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def decay_rules(model: nn.Module) -> dict[str, Rule]:
    """`decay`: matrices. `no_decay`: vectors, scalars, and what modules exempt in `no_decay_parameters()`.

    Raises:
        ConfigError: a module exempts a parameter that it does not have.
    """
    exempt = set(_declared(model, "no_decay_parameters"))

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and id(parameter) not in exempt

    return {"decay": decays, NO_DECAY: lambda name, parameter: not decays(name, parameter)}


def role_rules(model: nn.Module, weight_decay: WeightDecay) -> dict[str, Rule]:
    """One rule for each role that modules declare, and `no_decay` as in `decay_rules`.

    Raises:
        ConfigError: a declared parameter or role does not exist, a fused matrix has roles of unequal decay, or a role that
            was given a decay has no parameter.
    """
    roles = _declared(model, "parameter_roles")
    fused = {label: label for found in roles.values() for label in found if label not in ROLES}
    for label in fused:
        _check_fused(label.split("+"), weight_decay, [name for name, _ in _named(model, roles, label)])
    present = {role for found in roles.values() for label in found for role in label.split("+")}
    if idle := sorted(set(weight_decay.given) - present):
        raise ConfigError(
            f"optimizer.weight_decay gives a value to {', '.join(idle)}, and no parameter of the model has that role; the "
            f"roles here are {', '.join(role for role in ROLES if role in present) or 'none'}: remove the value."
        )

    def rule_of(label: str) -> Rule:
        return lambda name, parameter: label in roles.get(id(parameter), ())

    return {label: rule_of(label) for label in (*ROLES, *fused)} | {NO_DECAY: decay_rules(model)[NO_DECAY]}


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
            f"the groups are {', '.join(rules)}: mend what their modules say in parameter_roles() and "
            "no_decay_parameters(), or give weight_decay one number."
        )
    if not any(groups.values()):
        raise ConfigError("the model has no trainable parameter; unfreeze some, or evaluate it instead of training.")
    return groups


def decay_groups(model: nn.Module, weight_decay: float | WeightDecay) -> list[DecayGroup]:
    """The groups that are not empty: `decay` and `no_decay` for one number, else a group for each role and `no_decay`.

    Raises:
        ConfigError: see `decay_rules`, `role_rules` and `split_parameters`.
    """
    decay = weight_decay if isinstance(weight_decay, WeightDecay) else WeightDecay(default=weight_decay)
    rules = role_rules(model, decay) if decay.given else decay_rules(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        DecayGroup(
            label,
            0.0 if label == NO_DECAY else decay.of(label.split("+")[0]),
            {names[id(parameter)]: parameter for parameter in found},
        )
        for label, found in split_parameters(model, rules).items()
        if found
    ]


def parameter_groups(model: nn.Module, weight_decay: float | WeightDecay) -> list[dict[str, Any]]:
    """What a torch optimizer takes: every group with its decay. Raises ConfigError (see `decay_groups`)."""
    return [
        {"params": list(group.parameters.values()), "weight_decay": group.weight_decay}
        for group in decay_groups(model, weight_decay)
    ]


def group_table(model: nn.Module, weight_decay: float | WeightDecay) -> list[dict[str, Any]]:
    """The groups as plain data: `group`, `weight_decay`, `parameters` (number of values), `names` of the tensors.

    The model may be on the meta device. Raises ConfigError (see `decay_groups`).
    """
    return [
        {"group": g.name, "weight_decay": g.weight_decay, "parameters": g.count, "names": list(g.parameters)}
        for g in decay_groups(model, weight_decay)
    ]


def _declared(model: nn.Module, method: str) -> dict[int, tuple[str, ...]]:
    """What modules declare, by the parameter's identity: the labels of every declaration, each once.

    A declaration without labels (a tuple of names) has the label "". Several roles of one matrix are joined by "+".
    """
    values = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, tuple[str, ...]] = {}
    for prefix, module in model.named_modules():
        given: Any = getattr(module, method, tuple)()
        for local in given:
            name = f"{prefix}.{local}" if prefix else local
            if name not in values:
                raise ConfigError(
                    f"{method} names {name}, which the model does not have; correct the module that says so."
                )
            label = _label(name, given[local]) if isinstance(given, Mapping) else ""
            labels = found.setdefault(id(values[name]), ())
            found[id(values[name])] = labels if label in labels else (*labels, label)
    return found


def _label(name: str, roles: str | tuple[str, ...]) -> str:
    given = (roles,) if isinstance(roles, str) else roles
    if unknown := set(given) - set(ROLES):
        raise ConfigError(
            f"parameter_roles gives {name} the role {', '.join(sorted(unknown))}; roles are {', '.join(ROLES)}: "
            "correct the module that says so."
        )
    return "+".join(given)


def _named(model: nn.Module, roles: Mapping[int, tuple[str, ...]], label: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if label in roles.get(id(value), ())]


def _check_fused(roles: list[str], weight_decay: WeightDecay, names: list[str]) -> None:
    decays = [weight_decay.of(role) for role in roles]
    if len(set(decays)) > 1:
        raise ConfigError(
            f"{names[0]} is one matrix for {' and '.join(roles)}, and optimizer.weight_decay gives them "
            f"{' and '.join(f'{decay:g}' for decay in decays)}; give them one value, or split the matrix in its module."
        )
