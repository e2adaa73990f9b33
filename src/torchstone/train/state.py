"""Turn an optimizer's state into named tensors and plain data, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchstone.errors import CheckpointError


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors named `INDEX.KEY`, and the rest as JSON data."""
    full = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, entries in full["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, {"state": plain, "param_groups": full["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Put back what `optimizer_tensors` took.

    Raises:
        CheckpointError: groups or shapes do not fit this optimizer.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *data["state"].items()]:
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    current = optimizer.state_dict()["param_groups"]
    stored = data["param_groups"]
    if [group["params"] for group in current] != [group["params"] for group in stored]:
        raise CheckpointError("the checkpoint's optimizer has other parameter groups than this recipe's; it cannot be resumed.")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        moment = entries.get("exp_avg")
        if index >= len(parameters) or (moment is not None and moment.shape != parameters[index].shape):
            raise CheckpointError(f"the checkpoint's optimizer state {index} does not fit the model's parameters.")
    groups = [{**now, **then, "betas": tuple(then["betas"])} if "betas" in then else {**now, **then} for now, then in zip(current, stored, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def restore_model(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a model's tensors; raises CheckpointError naming what is missing, unknown or of another shape."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {found[name]}, the model {shape}" for name, shape in expected.items() if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit the recipe's model: {'; '.join(sorted(problems)[:5])}.")
    for name, value in model.state_dict().items():
        if value.dtype != tensors[name].dtype:
            raise CheckpointError(f"the checkpoint's {name} is {tensors[name].dtype}, the model's {value.dtype}.")
    model.load_state_dict(dict(tensors))
