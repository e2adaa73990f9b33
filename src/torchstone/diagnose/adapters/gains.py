"""The linear gain of a norm, whatever its author calls it: `weight`, 1 + weight, one for each head, or none.

A norm of unit-size input returns its gain, so the gain is measured and not read: for x of alternating sign and size 1024,
whose mean is 0, whose root mean square is 1024 exactly, and beside whose square every ε vanishes in fp32,

    gain = (norm(x) − norm(−x)) / 2 · sign(x)

which is exact in fp32, and leaves out a bias.

Shapes: h heads · d head channels · w width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError

SIZE = 1024.0


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class: RMSNorm, LayerNorm and everything called after them."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


@torch.no_grad()
def measure_gain(norm: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The factors, fp64 of `shape`, by which a norm multiplies an input of that shape once it has unit size.

    Raises:
        ConfigError: the last dimension is odd, for which alternating signs have no mean of 0.
    """
    if shape[-1] % 2:
        raise ConfigError(f"a norm over {shape[-1]} channels has no measurable gain; an even number is needed.")
    norm = copy.deepcopy(norm).float()
    parameter = next(norm.parameters(), None)
    sign = torch.ones(shape, device=None if parameter is None else parameter.device)
    sign[..., 1::2] = -1
    x = (SIZE * sign)[None, None]
    return ((norm(x) - norm(-x)) / 2 * sign)[0, 0].double()


def head_gain(norm: nn.Module | None, heads: int, dim: int) -> Tensor:
    """Gains [h, d] of a norm on queries or keys: over each head's channels, over all, or of each head's own; 1 for none.

    Raises:
        ConfigError: the norm's weight has another shape.
    """
    if norm is None:
        return torch.ones(heads, dim, dtype=torch.float64)
    weight = getattr(norm, "weight", None)
    shape = (dim,) if weight is None else tuple(weight.shape)
    if shape not in ((dim,), (heads * dim,), (heads, dim)):
        raise ConfigError(
            f"{type(norm).__name__} on queries or keys has a weight of shape {list(shape)} for {heads} heads of {dim} "
            "channels; known are one per channel, one per head and channel, or all in a row."
        )
    gain = measure_gain(norm, shape).cpu()
    return gain.expand(heads, dim) if shape == (dim,) else gain.view(heads, dim)
