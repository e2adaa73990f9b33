"""A convolution over the keys as one matrix product, for both convolutions of DAPE and for their gradients.

A kernel of k taps with shifts −⌊k/2⌋ … ⌊k/2⌋ and zeros beyond the ends is

    stack, then multiply     W [w, k·c] · stack(x) [k·c, n]        the cheaper form where the input is the narrower side
    multiply, then unstack   unstack(W [k·c, w] · x [w, n])        where the output is

`stack` puts beside each other what every tap reads; `unstack`, its transpose, adds up what every tap wrote. Multiplying
from the other side gives the gradients.

Shapes: g rows of the batch · c channels of the narrower side · w of the wider · r queries · s keys, n = r·s · k taps.
"""

from __future__ import annotations

from functools import cache
from math import prod

from torch import Tensor


@cache
def shifts(kernel: int) -> list[tuple[slice, slice]]:
    """For each tap: cells of the output, and the cells of the input that it reads for them."""
    reach = kernel // 2
    return [
        (slice(max(-shift, 0), min(-shift, 0) or None), slice(max(shift, 0), min(shift, 0) or None))
        for shift in range(-reach, reach + 1)
    ]


class Scratch:
    """Memory that blocks use one after the other. Fresh memory costs several times what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """An array without values; whatever had the name before is overwritten."""
        size = prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(2 * size)  # blocks grow with the keys that they read
        return self.buffers[name][:size].view(shape)


def stack(x_gcrs: Tensor, kernel: int, scratch: Scratch, transposed: bool = False) -> Tensor:
    """[g, c, r, s] → [g, k·c, n]: for each tap what it reads (what reads it, if transposed), 0 beyond the ends.

    The result is the scratch array "stack", or the argument itself where the kernel is 1.
    """
    if kernel == 1:
        return x_gcrs.flatten(2)
    g, c, r, s = x_gcrs.shape
    stacked = scratch.take("stack", g, kernel, c, r, s)
    for tap, (here, there) in enumerate(shifts(kernel)):
        to, source = (there, here) if transposed else (here, there)
        stacked[:, tap, ..., to] = x_gcrs[..., source]
        if to.start > 0:
            stacked[:, tap, ..., : to.start].zero_()
        if to.stop is not None:
            stacked[:, tap, ..., max(s + to.stop, 0) :].zero_()
    return stacked.view(g, kernel * c, r * s)


def unstack(p_gkn: Tensor, shape: tuple[int, int, int], kernel: int, transposed: bool = False) -> Tensor:
    """[g, k·c, n] → [g, *shape]: the transpose of `stack`; overwrites its argument. Shape is (c, r, s)."""
    taps = p_gkn.unflatten(1, (kernel, shape[0])).unflatten(3, shape[1:])
    middle = kernel // 2
    total = taps[:, middle]
    for tap, (here, there) in enumerate(shifts(kernel)):
        if tap != middle:
            to, source = (here, there) if transposed else (there, here)
            total[..., to] += taps[:, tap, ..., source]
    return total


def inward(weight: Tensor) -> Tensor:
    """A weight [w, c, 1, k] for "stack, then multiply", as [w, k·c]."""
    return weight[:, :, 0].transpose(1, 2).flatten(1)


def outward(weight: Tensor) -> Tensor:
    """A weight [c, w, 1, k] for "multiply, then unstack", as [k·c, w]."""
    return weight[:, :, 0].permute(2, 0, 1).flatten(0, 1)


def as_weight_inward(flat: Tensor, kernel: int) -> Tensor:
    """Back from `inward`."""
    return flat.unflatten(1, (kernel, -1)).transpose(1, 2).unsqueeze(2)


def as_weight_outward(flat: Tensor, kernel: int) -> Tensor:
    """Back from `outward`."""
    return flat.unflatten(0, (kernel, -1)).permute(1, 2, 0).unsqueeze(2)
