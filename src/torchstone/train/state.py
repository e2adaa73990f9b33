"""Turn models and optimizers into named tensors and plain data, and back, bit for bit.

An optimizer's state becomes tensors `INDEX.KEY` (INDEX counts parameters over all groups, KEY is the
optimizer's own, such as `exp_avg`) and plain data: scalar state and the settings of each group.

Random streams are not here, because the trainer has none to store: every draw is keyed by (seed, step).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchstone.errors import CheckpointError


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors named `INDEX.KEY`, and the rest as plain data."""
    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in full["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{index}.{key}"] = value
    return tensors, {"state": plain, "param_groups": full["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
    """Put back what `optimizer_tensors` took.

    Raises:
        CheckpointError: groups, shapes or types do not fit this optimizer.
    """
    current, stored = optimizer.state_dict()["param_groups"], data.get("param_groups")
    plain = data.get("state")
    if not isinstance(plain, Mapping) or not isinstance(stored, list) or _indices(current) != _indices(stored):
        raise CheckpointError(
            "the checkpoint's optimizer has other parameter groups than this recipe's; it cannot be resumed."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain.items()]:
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters) or not _fits(value, parameters[int(index)]):
            raise CheckpointError(f"the checkpoint's optimizer state {name} does not fit the model's parameters.")
        state.setdefault(int(index), {})[key] = value.clone() if isinstance(value, Tensor) else value
    groups = [_like({**now, **then}, now) for now, then in zip(current, stored, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def restore_model(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a model's tensors; raises CheckpointError naming what is missing, unknown or of another form."""
    expected = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name][1]} {found[name][0]}, the model's {form[1]} {form[0]}"
        for name, form in expected.items()
        if name in found and found[name] != form
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:5])
        raise CheckpointError(f"the checkpoint does not fit the recipe's model: {listed}.")
    model.load_state_dict(dict(tensors))


def _indices(groups: list[Any]) -> list[Any]:
    return [group.get("params") if isinstance(group, Mapping) else None for group in groups]


def _fits(value: Any, parameter: Tensor) -> bool:
    """Scalars fit any parameter (a step count); other tensors are moments of the parameter's form, or numbers along some of its
    dimensions (norms of rows), of its type or fp32."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return True
    sizes = zip(value.shape, parameter.shape, strict=False)
    form = value.dim() == parameter.dim() and all(found in (size, 1) for found, size in sizes)
    return form and value.dtype in (parameter.dtype, torch.float32)


def _like(group: dict[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """JSON made lists of tuples (`betas`); the template says where."""
    return {
        key: tuple(value) if isinstance(template.get(key), tuple) and isinstance(value, list) else value
        for key, value in group.items()
    }
