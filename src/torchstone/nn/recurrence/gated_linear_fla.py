"""Gated linear attention by the kernels of flash-linear-attention, on CUDA.

    pip install 'torchstone[gpu]'

The function is that of `gated_linear.gated_linear_attention`, in the layout of that package's `chunk_gla`: [b, t, h, k], log
gates, state [n, h, k, v] of n sequences. A row with several documents becomes several sequences of one long row, told apart by
`cu_seqlens`; only the first sequence of a row begins with the row's state, and only its last one hands a state on.

Pitfalls: not yet run on GPU. Finding where documents start makes the host wait for the device. The kernels compute in the
type of v and keep log gates and states in fp32, so that under bf16 they round more than our own form does. They have no
fp64, and their tiles are at least 16 channels wide: `auto` leaves fp64 and narrower heads to our own form.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from torchstone.errors import ConfigError, DependencyError

Backend = Literal["auto", "torch", "fla"]
KERNELS = "fla.ops.gla"
INSTALLED = (
    importlib.util.find_spec("fla") is not None
)  # looked up once: a compiler cannot, and a forward pass need not
NARROWEST = 16  # channels of a head that a tile of the kernels is filled by


def require_installed() -> None:
    """Raise DependencyError if the kernels were asked for and are absent."""
    if not INSTALLED:
        raise DependencyError(
            "backend fla needs flash-linear-attention, which is not installed; run: pip install 'torchstone[gpu]', or choose "
            "backend torch."
        )


def use_kernels(backend: Backend, device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether values of this type, in heads of so many channels, go through the kernels.

    Raises:
        ConfigError: they were asked for by name and the device is not CUDA, or the type is fp64.
    """
    if backend == "fla" and device.type != "cuda":
        raise ConfigError(f"backend fla runs on CUDA and the model is on {device.type}; choose backend auto or torch.")
    if backend == "fla" and dtype == torch.float64:
        raise ConfigError(
            "backend fla computes in fp32 at best and the model is in fp64; choose backend auto or torch."
        )
    suited = device.type == "cuda" and dtype != torch.float64 and channels >= NARROWEST
    return backend == "fla" or (backend == "auto" and suited and INSTALLED)


def fla_gated_linear_attention(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor | None = None,
    scale: float | None = None,
    starts_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [b, t, h, v] and the last state [b, h, k, v]; arguments as in `gated_linear_attention`."""
    kernels: Any = importlib.import_module(KERNELS)
    scale = k_bthk.shape[-1] ** -0.5 if scale is None else scale
    q_bthk, k_bthk, g_bthk = q_bthk.to(v_bthv.dtype), k_bthk.to(v_bthv.dtype), g_bthk.float()
    if starts_bt is None:
        o_bthv, last_bhkv = kernels.chunk_gla(
            q_bthk, k_bthk, v_bthv, g_bthk, scale=scale, initial_state=state_bhkv, output_final_state=True
        )
        return o_bthv, last_bhkv
    b, t, h, keys = k_bthk.shape
    first_b, bounds_n, row_n = _sequences(starts_bt.expand(b, t))
    start_nhkv = v_bthv.new_zeros(len(row_n), h, keys, v_bthv.shape[-1], dtype=torch.float32)
    if state_bhkv is not None:
        kept_b = ~starts_bt.expand(b, t)[:, 0]
        start_nhkv = start_nhkv.index_copy(0, first_b, state_bhkv.float() * kept_b[:, None, None, None])
    flat = (x.flatten(0, 1).unsqueeze(0) for x in (q_bthk, k_bthk, v_bthv, g_bthk))
    o_1nhv, last_nhkv = kernels.chunk_gla(
        *flat, scale=scale, initial_state=start_nhkv, output_final_state=True, cu_seqlens=bounds_n
    )
    last_b = torch.cat([first_b[1:], first_b.new_tensor([len(row_n)])]) - 1
    return o_1nhv.view(b, t, h, -1), last_nhkv[last_b]


def _sequences(starts_bt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all rows behind each other: the first sequence of each row, all borders, and the row of each sequence.

    A row always starts a sequence, with its state unless a document starts there too.
    """
    b, t = starts_bt.shape
    cuts_bt = starts_bt.clone()
    cuts_bt[:, 0] = True
    begin_n = cuts_bt.flatten().nonzero().flatten()
    row_n = begin_n // t
    first_b = torch.searchsorted(row_n, torch.arange(b, device=row_n.device))
    return first_b, torch.cat([begin_n, begin_n.new_tensor([b * t])]), row_n
