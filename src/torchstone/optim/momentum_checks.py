"""What our optimizers refuse: unknown and impossible settings of a group, parameters that they cannot update, other states."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor
from torch.distributed.tensor import DTensor

from torchstone.errors import ConfigError
from torchstone.optim.angle import AngleSchedule
from torchstone.optim.momentum_direction import BiasCorrection

ROTATION = ("rotational", "per_neuron", "zero_mean", "update_norm_decay", "angle_schedule", "peak_lr", "eps_norm")
SHARES = ("beta", "betas", "momentum", "update_norm_decay")
CHOICES = {"bias_correction": get_args(BiasCorrection), "angle_schedule": get_args(AngleSchedule)}
OF_TORCH = ("params", "param_names", "name", "initial_lr")
"""Entries of a group that no optimizer of ours reads: torch's own, a label, and what schedulers leave."""


def refuse_unknown(kind: str, group: Mapping[str, Any], defaults: Collection[str]) -> None:
    """Raises ConfigError for settings of a group that the optimizer does not have."""
    unknown = sorted(group.keys() - {*defaults, *OF_TORCH})
    if set(unknown) & set(ROTATION):
        raise ConfigError(
            f"{kind} does not rotate, and a group gives {', '.join(unknown)}; remove it, or use LionAR or Rotational."
        )
    if unknown:
        raise ConfigError(
            f"a group of {kind} gives {', '.join(unknown)}, which it does not have; it has {', '.join(defaults)}."
        )


def refuse_parameters(known: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Raises ConfigError for a parameter that is listed twice or sharded over processes."""
    seen = set(map(id, known))
    for position, parameter in enumerate(new):
        if id(parameter) in seen:
            raise ConfigError(
                f"a parameter of shape {list(parameter.shape)} is listed twice (entry {position} of its group repeats "
                "an earlier one; tied weights are one parameter): list it once, as model.parameters() does."
            )
        if isinstance(parameter, DTensor):
            raise ConfigError(
                f"a parameter of shape {list(parameter.shape)} is a DTensor, spread over processes, and norms and angles of rows "
                "need whole rows; give whole tensors (DDP), or use torch's AdamW."
            )
        seen.add(id(parameter))


def check_state(kind: str, given: Mapping[str, Any], moments: Collection[str], settings: Collection[str]) -> None:
    """Raises ConfigError where a state dict is that of another kind of optimizer."""
    absent = {name for group in given["param_groups"] for name in settings if name not in group}
    for state in given["state"].values():
        absent |= {"step", *moments} - state.keys()
        absent |= {"exp_avg_sq"} & state.keys() - set(moments)
    if absent:
        raise ConfigError(
            f"the state is not that of {kind}: {', '.join(sorted(absent))} differ; load what an optimizer of the same kind "
            "and settings has saved, or begin with an empty state."
        )


def check_group(group: Mapping[str, Any]) -> None:
    """Raises ConfigError where a setting is out of range or a rotation has no angle."""
    for key, allowed in CHOICES.items():
        if group.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{key} is {group[key]!r}; choose one of {', '.join(allowed)}.")
    for key in ("lr", "weight_decay"):
        if not float(group[key]) >= 0:
            raise ConfigError(f"{key} is {group[key]}; it is to be 0 or more.")
    for key in SHARES:
        value = group.get(key)
        for number in value if isinstance(value, tuple | list) else [value]:
            if number is not None and not 0 <= number < 1:
                raise ConfigError(f"{key} is {value}; give values from 0 up to, but not including, 1.")
    for key in ("eps", "eps_norm"):
        if not group.get(key, 1.0) > 0:
            raise ConfigError(f"{key} is {group[key]}; it is to be above 0.")
    if group.get("rotational") and group["weight_decay"] == 0:
        raise ConfigError(
            "a rotational group has weight_decay 0, which makes the target angle 0, so that nothing would move; give it a "
            "weight_decay above 0, or rotational=False."
        )
    if group.get("angle_schedule") == "linear" and not (group.get("peak_lr") or 0) > 0:
        raise ConfigError(
            f"the linear angle schedule needs the peak learning rate, and peak_lr is {group.get('peak_lr')}; give peak_lr (the "
            "largest rate of the schedule), or angle_schedule='sqrt'."
        )
    if group.get("angle_schedule") == "linear" and float(group["lr"]) > float(group["peak_lr"]) * (1 + 1e-6):
        raise ConfigError(
            f"lr is {float(group['lr']):g}, above peak_lr {float(group['peak_lr']):g}, which is to be the largest rate of the "
            "schedule; raise peak_lr."
        )
