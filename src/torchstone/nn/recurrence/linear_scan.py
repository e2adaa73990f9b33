"""First-order linear scan: a recurrence whose gates do not depend on its state.

    h_t = a_t ⊙ h_{t−1} + b_t

Its derivative is a scan of the same kind, run backwards:

    g_t = ∂h_t + a_{t+1} ⊙ g_{t+1},   ∂b_t = g_t,   ∂a_t = g_t ⊙ h_{t−1},   ∂h_0 = a_1 ⊙ g_1

So neither direction needs autograd: a Python loop under autograd records a graph of T steps and keeps every intermediate
state twice, this keeps `a` and `h` and walks back over them. The loop writes in place into what becomes the result.

Shapes: b batch · t time · d channels · c blocks of l steps (t = c·l).

The walk goes in blocks. All blocks advance together, in l operations of [b, c, d] that also form the products of `a` inside
each block; the states at the ends of blocks are a scan of length c, done in the same way; then each block adds product · state.
That is about 2·l operations for each level in place of T. The products are exp(A_t − A_j), A the running sum of log a: at most 1
where a is, and nothing is ever divided by them, so that strong decay only rounds them to 0.

Pitfalls: the arithmetic is fp32, or fp64 for fp64 input, whatever the model's type; a decay of 0.999 is 1 in bf16. The two
directions are operators of their own (`torchstone::linear_scan`), which a compiler does not unroll. There is no second
derivative. Not yet run on GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 32  # steps of a block at most
SHORT = 16  # up to here the walk goes step by step


def linear_scan(a_btd: Tensor, b_btd: Tensor, initial_bd: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All states [b, t, d] and the last one [b, d], in fp32 or finer, differentiable in every argument.

    Args:
        a_btd: factors of the state before.
        b_btd: what is added, of the same shape.
        initial_bd: state before the first step; None for zero.
    """
    fine = torch.promote_types(b_btd.dtype, torch.float32)
    a_btd, b_btd = a_btd.to(fine), b_btd.to(fine)
    if initial_bd is None:
        initial_bd = b_btd.new_zeros(b_btd.shape[0], b_btd.shape[2])
    h_btd = _scan(a_btd, b_btd, initial_bd.to(fine))
    return h_btd, h_btd[:, -1]


@torch.library.custom_op("torchstone::linear_scan", mutates_args=())
def _scan(a_btd: Tensor, b_btd: Tensor, initial_bd: Tensor) -> Tensor:
    """All states."""
    h_btd = b_btd.clone(memory_format=torch.contiguous_format)
    advance(h_btd, a_btd, initial_bd, backwards=False)
    return h_btd


@_scan.register_fake
def _(a_btd: Tensor, b_btd: Tensor, initial_bd: Tensor) -> Tensor:
    return torch.empty_like(b_btd, memory_format=torch.contiguous_format)


@torch.library.custom_op("torchstone::linear_scan_backward", mutates_args=())
def _scan_backward(
    gradient_btd: Tensor, a_btd: Tensor, h_btd: Tensor, initial_bd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, of b and of the initial state."""
    g_btd = gradient_btd.clone(memory_format=torch.contiguous_format)
    advance(g_btd[:, :-1], a_btd[:, 1:], g_btd[:, -1], backwards=True)
    by_a_btd = torch.empty_like(g_btd)
    torch.mul(g_btd[:, 1:], h_btd[:, :-1], out=by_a_btd[:, 1:])
    torch.mul(g_btd[:, 0], initial_bd, out=by_a_btd[:, 0])
    return by_a_btd, g_btd, a_btd[:, 0] * g_btd[:, 0]


@_scan_backward.register_fake
def _(gradient_btd: Tensor, a_btd: Tensor, h_btd: Tensor, initial_bd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h_btd), torch.empty_like(h_btd), torch.empty_like(initial_bd)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output, inputs[2])


def _derive(ctx: Any, gradient_btd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a_btd, h_btd, initial_bd = ctx.saved_tensors
    found: tuple[Tensor, Tensor, Tensor] = _scan_backward(gradient_btd, a_btd, h_btd, initial_bd)
    return found


_scan.register_autograd(_derive, setup_context=_keep)


def advance(h_btd: Tensor, a_btd: Tensor, start_bd: Tensor, backwards: bool) -> None:
    """h_t += a_t ⊙ h_{t−1} in place for every t in turn, where h_{−1} is `start`; from the end for `backwards`.

    Args:
        h_btd: what is added before, states after.
        a_btd: factors; not changed.
        start_bd: the state that the walk begins with; not changed.
        backwards: the walk goes from the last step to the first.
    """
    length = h_btd.shape[1]
    if length <= SHORT:
        _step_by_step(h_btd, a_btd, start_bd, backwards)
        return
    block = min(BLOCK, int(length**0.5))
    whole = length - length % block
    first, rest = slice(0, whole), slice(whole, length)
    if backwards:
        first, rest = slice(length - whole, length), slice(0, length - whole)
    _in_blocks(h_btd[:, first], a_btd[:, first], start_bd, backwards, block)
    if whole < length:
        reached_bd = h_btd[:, first][:, 0 if backwards else -1]
        _step_by_step(h_btd[:, rest], a_btd[:, rest], reached_bd, backwards)


def _step_by_step(h_btd: Tensor, a_btd: Tensor, state_bd: Tensor, backwards: bool) -> None:
    order = -1 if backwards else 1
    for a_bd, h_bd in zip(a_btd.unbind(1)[::order], h_btd.unbind(1)[::order], strict=True):
        state_bd = h_bd.addcmul_(a_bd, state_bd)


def _in_blocks(h_btd: Tensor, a_btd: Tensor, start_bd: Tensor, backwards: bool, block: int) -> None:
    order = -1 if backwards else 1
    h_bcld = h_btd.unflatten(1, (-1, block))
    product_bcld = a_btd.unflatten(1, (-1, block)).clone(memory_format=torch.contiguous_format)
    states, products = h_bcld.unbind(2)[::order], product_bcld.unbind(2)[::order]
    for step in range(1, block):
        states[step].addcmul_(products[step], states[step - 1])
        products[step].mul_(products[step - 1])
    end_bcd = states[-1].clone(memory_format=torch.contiguous_format)
    advance(end_bcd, products[-1], start_bd, backwards)
    first, later, earlier = (-1, slice(None, -1), slice(1, None)) if backwards else (0, slice(1, None), slice(None, -1))
    h_bcld[:, first].addcmul_(product_bcld[:, first], start_bd[:, None])
    h_bcld[:, later].addcmul_(product_bcld[:, later], end_bcd[:, earlier, None])
