"""Attention for short sequences on the CPU: explicit maps, made for one block of queries at a time.

    maps_m = softmax(scale · q_m k_mᵀ + bias),   weights = maps_1, or maps_1 − λ maps_2,   out = weights · v

A block of queries reads only the keys up to its last query, which saves nearly half of the work of full maps, and two
maps are subtracted before the values are read once. Every step is one library call on a block that fits the cache;
the maps are kept, in the inputs' precision, for the backward pass.

Shapes: b batch · m maps of a head (1 or 2) · h heads · t queries and as many keys · d key channels · e value channels ·
n = b·m·h.

Why not torch's fused kernel: on CPUs in bf16 it needs 1.5 to 4 times as long, it cannot combine maps, and with a bias
in fp32 it takes 1 to 2 times as long in training from 128 tokens on (at 64 tokens three quarters). Why not plain
operations under torch.compile: every block size becomes kernels of its own, minutes of compilation. This is one opaque
operator with a gradient of its own, the same with and without compilation.

Pitfalls: memory grows with t² (0.55 to 0.75 of b·m·h·t² values per layer). In bf16 the scores are rounded before the softmax,
whose arithmetic is fp32; a bias, which may be large, is added in its own precision. The operator has no second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 128  # queries


def blocked_attention(
    q_bmhtd: Tensor,
    k_bmhtd: Tensor,
    v_bhte: Tensor,
    lambda_bht: Tensor | None,
    allowed_b1ts: Tensor | None,
    scale: float,
    bias_bhts: Tensor | None = None,
) -> Tensor:
    """Causal attention outputs [b, h, t, e].

    Args:
        q_bmhtd, k_bmhtd, v_bhte: one key and value head per query head.
        lambda_bht: fp32, of a shape that broadcasts to [b, h, t]; None exactly where m = 1.
        allowed_b1ts: visibility beyond causality, or None; must not make a later key visible.
        scale: factor of the scores.
        bias_bhts: added to the scores of all maps of a head, fp32 or finer, with 1 for b where all rows agree.
    """
    keep = torch.is_grad_enabled()
    return _attention(q_bmhtd, k_bmhtd, v_bhte, lambda_bht, allowed_b1ts, bias_bhts, scale, keep)[0]


def _blocks(length: int) -> Iterator[slice]:
    """The queries of each block."""
    block = min(max(ceil(length / 4), SMALLEST_BLOCK), LARGEST_BLOCK)
    for start in range(0, length, block):
        yield slice(start, min(start + block, length))


@torch.library.custom_op("torchstone::blocked_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float,
    keep: bool,
) -> list[Tensor]:
    """Output, then (with `keep`) the maps [n, rows, seen] of every block."""
    b, m, h, t, d = q.shape
    q_ntd, k_ntd = q.flatten(0, 2), k.flatten(0, 2)
    v_hte = v.flatten(0, 1)
    out = _empty_output(v)
    kept = []
    for rows in _blocks(t):
        scores = _scores(q_ntd[:, rows], k_ntd[:, : rows.stop], scale)
        if bias is not None:
            part = bias[:, None, :, rows, : rows.stop]
            scores = (scores.unflatten(0, (b, m, h)) + part).flatten(0, 2)
        maps = _maps(scores, allowed, rows, (b, m * h)).to(q.dtype)
        weights = _weights(maps, lam, rows, (b, m, h))
        out[:, :, rows] = (weights @ v_hte[:, : rows.stop]).unflatten(0, (b, h))
        if keep:
            kept.append(maps)
    return [out, *kept]


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float,
    keep: bool,
) -> list[Tensor]:
    b, m, h, t, _ = q.shape
    out = _empty_output(v)
    sizes = [(rows.stop - rows.start, rows.stop) for rows in _blocks(t)] if keep else []
    return [out, *(q.new_empty(b * m * h, *size) for size in sizes)]


def _empty_output(v: Tensor) -> Tensor:
    """[b, h, t, e] with the memory of [b, t, h, e], which is what the output projection reads."""
    b, h, t, e = v.shape
    return v.new_empty(b, t, h, e).transpose(1, 2)


def _scores(q_nrd: Tensor, k_nsd: Tensor, scale: float) -> Tensor:
    """The scores of one block, [n, rows, seen]."""
    scores = q_nrd.new_empty(q_nrd.shape[0], q_nrd.shape[1], k_nsd.shape[1])
    return scores.baddbmm_(q_nrd, k_nsd.transpose(1, 2), beta=0, alpha=scale)


def _maps(scores: Tensor, allowed: Tensor | None, rows: slice, shape: tuple[int, int]) -> Tensor:
    """The maps of one block, [n, rows, seen]; overwrites the scores."""
    count, seen = scores.shape[1:]
    if allowed is None:
        later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores[:, :, rows].masked_fill_(later, -torch.inf)
    else:
        scores.unflatten(0, shape).masked_fill_(~allowed[:, :, rows, :seen], -torch.inf)
    return scores.softmax(dim=-1)


def _weights(maps: Tensor, lam: Tensor | None, rows: slice, shape: tuple[int, int, int]) -> Tensor:
    """What multiplies the values, [b·h, rows, seen]."""
    if lam is None:
        return maps
    first, second = maps.unflatten(0, shape).unbind(1)
    lam = _rows_of(lam, rows).unsqueeze(-1).to(maps.dtype)
    return torch.addcmul(first, second, lam, value=-1).flatten(0, 1)


def _rows_of(lam: Tensor, rows: slice) -> Tensor:
    return lam if lam.shape[-1] == 1 else lam[..., rows]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, lam, _, bias, scale, _ = inputs
    ctx.save_for_backward(q, k, v, lam, *output[1:])
    ctx.scale = scale
    ctx.bias_rows = 0 if bias is None else bias.shape[0]


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, lam, *maps = ctx.saved_tensors
    bias_rows = ctx.bias_rows if ctx.needs_input_grad[5] else 0
    gradients = _attention_backward(grads[0], q, k, v, lam, maps, ctx.scale, bias_rows)
    grad_lam = None if lam is None else gradients[3].sum_to_size(lam.shape)
    grad_bias = gradients[-1] if bias_rows else None
    return gradients[0], gradients[1], gradients[2], grad_lam, None, grad_bias, None, None


@torch.library.custom_op("torchstone::blocked_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, maps: list[Tensor], scale: float, bias_rows: int
) -> list[Tensor]:
    """Gradients of q, k, v; with λ, of λ at every [b, h, t]; with `bias_rows` (1 or b), of the bias."""
    b, m, h, t, d = q.shape
    q_ntd, k_ntd = q.flatten(0, 2), k.flatten(0, 2)
    v_hte, grad_hte = v.flatten(0, 1), grad.flatten(0, 1)
    grad_q = torch.empty_like(q_ntd)
    fine = torch.promote_types(q.dtype, torch.float32)
    grad_k, grad_v = torch.zeros_like(k_ntd), torch.zeros_like(v_hte)
    grad_lam = grad.new_empty(b, h, t, dtype=fine)
    grad_bias = grad.new_zeros(bias_rows, h, t, t, dtype=fine)
    for rows, block in zip(_blocks(t), maps, strict=True):
        seen, grad_rows = rows.stop, grad_hte[:, rows]
        grad_v[:, :seen].baddbmm_(_weights(block, lam, rows, (b, m, h)).transpose(1, 2), grad_rows)
        grad_weights = grad_rows @ v_hte[:, :seen].transpose(1, 2)
        if lam is not None:
            second = block.unflatten(0, (b, m, h))[:, 1].reshape(b * h, *block.shape[1:])
            output = (second @ v_hte[:, :seen]).to(fine)
            grad_lam[:, :, rows] = -(grad_rows * output).sum(-1).unflatten(0, (b, h))
            minus = -_rows_of(lam, rows).expand(b, h, seen - rows.start).unsqueeze(-1).to(grad.dtype)
            both = [grad_weights.unflatten(0, (b, h)), grad_weights.unflatten(0, (b, h)) * minus]
            grad_weights = torch.stack(both, dim=1).flatten(0, 2)
        grad_scores = torch._softmax_backward_data(grad_weights, block, -1, block.dtype)
        if bias_rows:
            of_heads = grad_scores.unflatten(0, (b, m, h)).sum(1 if bias_rows == b else (0, 1), dtype=fine)
            grad_bias[:, :, rows, :seen] = of_heads
        grad_q[:, rows].baddbmm_(grad_scores, k_ntd[:, :seen], beta=0, alpha=scale)
        grad_k[:, :seen].baddbmm_(grad_scores.transpose(1, 2), q_ntd[:, rows], alpha=scale)
    of_inputs = [grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape)]
    return of_inputs + ([] if lam is None else [grad_lam]) + ([grad_bias] if bias_rows else [])


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, maps: list[Tensor], scale: float, bias_rows: int
) -> list[Tensor]:
    b, _, h, t, _ = q.shape
    fine = torch.promote_types(q.dtype, torch.float32)
    found = [x.new_empty(x.shape) for x in (q, k, v)]
    if lam is not None:
        found.append(grad.new_empty(b, h, t, dtype=fine))
    if bias_rows:
        found.append(grad.new_empty(bias_rows, h, t, t, dtype=fine))
    return found


_attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.torchstone.blocked_attention)
def _flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Forward FLOPs, maps in full, as torch counts its own attention."""
    b, m, h, t, d = q
    return 2 * b * h * t * t * (m * d + v[-1])


@register_flop_formula(torch.ops.torchstone.blocked_attention_backward)
def _backward_flops(
    grad: tuple[int, ...], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """Twice the forward pass; nothing is recomputed, but for the small part that λ's gradient needs."""
    return 2 * _flops(q, k, v)
