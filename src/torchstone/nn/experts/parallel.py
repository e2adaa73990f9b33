"""Grouped products: every row is multiplied by the matrix of its own expert.

    y_m = W_{e(m)} x_m,   rows sorted by expert: expert e owns the rows from ends[e-1] to ends[e]

Rows are (token, slot) pairs. There is no capacity and nothing is dropped: every row is multiplied by exactly one matrix. An
expert without rows gets a gradient of zeros (not of nothing, for which other ranks of data-parallel training would wait).

Shapes: m rows · r rows of one expert · i inputs · o outputs · e experts.

One operator with a gradient of its own, opaque to `torch.compile`, and three ways of computing it:

- CPU: one matrix product per expert on its slice, written in place. Where slices end is read from the tensor, which costs
  nothing on a CPU.
- CUDA, bf16, capability 9.0 or later, sizes that are multiples of 8: torch's grouped product. One kernel, no host
  synchronisation.
- CUDA otherwise: rows are scattered into [e, m, i] and multiplied as a batch into [e, m, o], without synchronisation too, at e
  times the work and e times the memory of the rows: how many rows an expert has is known on the GPU alone, so that there is room
  for all m of them at each. The gradient of the matrices pads inputs and gradients alike. A way of being right, not of being
  fast, and for small batches and few experts.

Pitfall: torch's grouped product left gradients of empty experts undefined on some GPUs (pytorch issue 172439); they are set to
zero here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

GROUPED_CAPABILITY = (9, 0)
ALIGNED = 8  # bf16 values in 16 bytes


def expert_linear(x_mi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    """Rows [m, o]: each row times the matrix of its expert, in autocast's type where it is on.

    Args:
        x_mi: rows sorted by expert.
        weight_eoi: one matrix per expert.
        ends_e: int32 [e], where the rows of each expert end; the last is m.
    """
    device = x_mi.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_mi, weight_eoi = x_mi.to(dtype), weight_eoi.to(dtype)
    product: Tensor = _product(x_mi, weight_eoi, ends_e)
    return product


@torch.library.custom_op("torchstone::expert_product", mutates_args=())
def _product(x_mi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    """x W_eᵀ for every row."""
    y_mo, rows = x_mi.new_empty(x_mi.shape[0], weight_eoi.shape[1]), _rows(ends_e)
    matrices = weight_eoi.transpose(1, 2).unbind()
    for x_ri, matrix_io, y_ro in zip(x_mi.split(rows), matrices, y_mo.split(rows), strict=True):
        torch.mm(x_ri, matrix_io, out=y_ro)
    return y_mo


@torch.library.custom_op("torchstone::expert_outer", mutates_args=())
def _outer(grad_mo: Tensor, x_mi: Tensor, ends_e: Tensor) -> Tensor:
    """Σ of grad ⊗ x over the rows of each expert, [e, o, i]: the gradient of the matrices."""
    outer_eoi, rows = x_mi.new_empty(ends_e.shape[0], grad_mo.shape[1], x_mi.shape[1]), _rows(ends_e)
    for grad_or, x_ri, outer_oi in zip(
        grad_mo.t().split(rows, dim=1), x_mi.split(rows), outer_eoi.unbind(), strict=True
    ):
        torch.mm(grad_or, x_ri, out=outer_oi)
    return outer_eoi


def _rows(ends_e: Tensor) -> list[int]:
    """How many rows every expert has."""
    return [stop - start for start, stop in pairwise([0, *ends_e.tolist()])]


@_product.register_fake
def _(x_mi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    return x_mi.new_empty(x_mi.shape[0], weight_eoi.shape[1])


@_outer.register_fake
def _(grad_mo: Tensor, x_mi: Tensor, ends_e: Tensor) -> Tensor:
    return x_mi.new_empty(ends_e.shape[0], grad_mo.shape[1], x_mi.shape[1])


@_product.register_kernel("cuda")
def _(x_mi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    kernel = grouped_product if _fits_grouped(x_mi, weight_eoi.shape[1]) else padded_product
    return kernel(x_mi, weight_eoi, ends_e)


@_outer.register_kernel("cuda")
def _(grad_mo: Tensor, x_mi: Tensor, ends_e: Tensor) -> Tensor:
    kernel = grouped_outer if _fits_grouped(x_mi, grad_mo.shape[1]) else padded_outer
    return kernel(grad_mo, x_mi, ends_e)


def _fits_grouped(x_mi: Tensor, outputs: int) -> bool:
    """Whether torch's grouped product has a kernel for these rows that does not wait for the GPU."""
    if x_mi.dtype != torch.bfloat16 or x_mi.shape[0] == 0 or x_mi.shape[1] % ALIGNED or outputs % ALIGNED:
        return False
    return torch.cuda.get_device_capability(x_mi.device) >= GROUPED_CAPABILITY


def grouped_product(x_mi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    """The product as one kernel."""
    return F.grouped_mm(x_mi.contiguous(), weight_eoi.transpose(1, 2), offs=ends_e)


def grouped_outer(grad_mo: Tensor, x_mi: Tensor, ends_e: Tensor) -> Tensor:
    """The gradient of the matrices as one kernel."""
    outer_eoi = F.grouped_mm(grad_mo.contiguous().t(), x_mi.contiguous(), offs=ends_e)
    empty_e = ends_e.diff(prepend=ends_e.new_zeros(1)) == 0
    return outer_eoi.masked_fill(empty_e[:, None, None], 0.0)


def padded_product(x_mi: Tensor, weight_eoi: Tensor, ends_e: Tensor) -> Tensor:
    """The product as a batch over experts; [e, m, i] and [e, m, o] are in memory at once."""
    place = _places(x_mi, ends_e)
    return (_padded(x_mi, place, ends_e) @ weight_eoi.transpose(1, 2))[place]


def padded_outer(grad_mo: Tensor, x_mi: Tensor, ends_e: Tensor) -> Tensor:
    """The gradient of the matrices as a batch over experts; [e, m, o] and [e, m, i] are in memory at once."""
    place = _places(x_mi, ends_e)
    return _padded(grad_mo, place, ends_e).transpose(1, 2) @ _padded(x_mi, place, ends_e)


def _places(x_mi: Tensor, ends_e: Tensor) -> tuple[Tensor, Tensor]:
    """The expert of every row, and its place among that expert's rows."""
    row_m = torch.arange(x_mi.shape[0], device=x_mi.device, dtype=ends_e.dtype)
    owner_m = torch.searchsorted(ends_e, row_m, right=True)
    starts_e = torch.cat([ends_e.new_zeros(1), ends_e[:-1]])
    return owner_m, row_m - starts_e[owner_m]


def _padded(x_mi: Tensor, place: tuple[Tensor, Tensor], ends_e: Tensor) -> Tensor:
    """Rows by expert, [e, m, i], zeros behind the rows that an expert has."""
    padded_emi = x_mi.new_zeros(ends_e.shape[0], *x_mi.shape)
    return padded_emi.index_put_(place, x_mi)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_mo: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_mi, weight_eoi, ends_e = ctx.saved_tensors
    grad_mo = grad_mo.contiguous()
    grad_x = _product(grad_mo, weight_eoi.transpose(1, 2), ends_e) if ctx.needs_input_grad[0] else None
    grad_weight = _outer(grad_mo, x_mi, ends_e) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_product.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.torchstone.expert_product)
def _flops(x_mi: tuple[int, ...], weight_eoi: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * x_mi[0] * weight_eoi[1] * weight_eoi[2]


@register_flop_formula(torch.ops.torchstone.expert_outer)
def _outer_flops(grad_mo: tuple[int, ...], x_mi: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * x_mi[0] * grad_mo[1] * x_mi[1]
