"""Weights as rows: the view on which rotational updates work, centring, and norms that must not be zero.

Per neuron, a row is everything that belongs to one index of the first dimension; otherwise the whole tensor is one row.

Shapes: r rows · c values of a row.

Pitfall: norms are taken in fp64 and means in fp32 at least, whatever the type of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.errors import ConfigError

CENTRED = 1e-5
"""A mean of a row within this share of its root mean square is rounding: the row counts as centred."""


def state_dtype(parameter: Tensor) -> torch.dtype:
    """The type in which an update of the parameter is computed and its state kept."""
    return torch.promote_types(parameter.dtype, torch.float32)


def row_shape(parameter: Tensor, per_neuron: bool) -> tuple[int, int]:
    """Rows and values of a row."""
    rows = parameter.shape[0] if per_neuron and parameter.dim() > 0 else 1
    return rows, parameter.numel() // max(rows, 1)


def norm_shape(parameter: Tensor, per_neuron: bool) -> tuple[int, ...]:
    """Shape of a number per row that broadcasts over the parameter: [out, 1, …], or [1, …] for the whole tensor."""
    rows, _ = row_shape(parameter, per_neuron)
    return (rows, *(1,) * (parameter.dim() - 1)) if parameter.dim() else ()


def row_norms(parameter: Tensor, per_neuron: bool, name: str) -> Tensor:
    """Norm of every row, in the shape of `norm_shape`.

    Raises:
        ConfigError: a row is zero, so that no angle is defined.
    """
    w_rc = parameter.detach().reshape(row_shape(parameter, per_neuron)).to(state_dtype(parameter))
    norm_r = torch.linalg.vector_norm(w_rc, dim=1, dtype=torch.float64).to(w_rc.dtype)
    _refuse_zero(norm_r, name, per_neuron, "has zero norm")
    return norm_r.view(norm_shape(parameter, per_neuron))


@torch.no_grad()
def centre(parameter: Tensor, per_neuron: bool, name: str, *, write: bool = True) -> None:
    """Subtract the mean of every row and rescale the row to its former norm, in place; without `write` only check that it can be.

    A row that is centred up to rounding stays bit for bit what it is, so that building an optimizer for trained weights changes
    nothing.

    Raises:
        ConfigError: a row is zero, or constant, so that centring makes it zero.
    """
    w_rc = parameter.detach().reshape(row_shape(parameter, per_neuron)).to(state_dtype(parameter))
    norm_r1 = row_norms(parameter, per_neuron, name).view(-1, 1)
    mean_r1 = w_rc.mean(1, keepdim=True)
    limit = max(CENTRED, torch.finfo(parameter.dtype).eps)
    off_r1 = mean_r1.abs() > limit * norm_r1 / w_rc.shape[1] ** 0.5
    centred_rc = w_rc - mean_r1
    centred_r = torch.linalg.vector_norm(centred_rc, dim=1)
    constant_r = off_r1[:, 0] & (centred_r <= 1e-6 * norm_r1[:, 0])
    _refuse_zero((~constant_r).float(), name, per_neuron, "is constant, and centring (zero_mean) makes it zero")
    if not write:
        return
    centred_rc.mul_(norm_r1 / centred_r[:, None])
    parameter.copy_(torch.where(off_r1, centred_rc, w_rc).view(parameter.shape))


def _refuse_zero(values_r: Tensor, name: str, per_neuron: bool, what: str) -> None:
    zero = torch.nonzero(values_r == 0)
    if len(zero):
        where = f"row {int(zero[0])} of {name}" if per_neuron else name
        raise ConfigError(
            f"{where} {what}: a rotational update is undefined. Give it other initial values, or put the parameter into a group "
            "with rotational=False."
        )
