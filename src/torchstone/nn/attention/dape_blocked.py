"""DAPE's attention on the CPU: scores, convolutions and softmax for one block of queries at a time.

    S = scale · q kᵀ,   A = LeakyReLU(W1 ∗ visible(S, b) + c1),   maps = softmax(S + b + W2 ∗ A),   out = maps · v

where ∗ is a convolution over the keys. A direct transcription writes maps of all heads and of the hidden layer to memory
about ten times. Here

- a block of queries reads only the keys up to its last one, which saves nearly half of everything, and its arrays fit
  the cache;
- a convolution is one matrix product (`nn.attention.dape_taps`);
- what Conv1 makes of the bias does not depend on the row of the batch, and is made once for all, as is its gradient
  (unless the rows see different keys, as packed documents do);
- scores, hidden layer and maps are kept for the backward pass: reading them is faster than making them again;
- everything else lives in scratch arrays, because a product into fresh memory takes five times as long.

Shapes: b batch · u maps · t queries, the last ones of s tokens · s keys · d key channels · e value channels · w hidden
width · k taps · g rows of the batch at a time · r queries of a block, n = r · keys that the block reads.

Pitfalls: everything is in fp32 or finer. Memory grows with t² (a little more than b·(2u + w)·t²/2 values per layer). The
bias of Conv2 adds the same to all scores of a query, which softmax ignores: it is not used and its gradient is 0. The
operator has no second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchstone.nn.attention.dape_taps import (
    Scratch,
    as_weight_inward,
    as_weight_outward,
    inward,
    outward,
    stack,
    unstack,
)

SLOPE = 0.01  # of LeakyReLU
BLOCK_CELLS = 1 << 14  # query-key pairs that a thread computes at a time
LARGEST_BLOCK = 32  # queries


def dape_attention(
    q_butd: Tensor,
    k_busd: Tensor,
    v_buse: Tensor,
    bias_buts: Tensor | None,
    allowed_b1ts: Tensor | None,
    convolutions: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    mask_hidden: bool,
) -> Tensor:
    """Causal attention outputs [b, u, t, e], in fp32 or finer.

    Args:
        q_butd, k_busd, v_buse: one key and value head per map; the queries are the last t of the s tokens.
        bias_buts: of the position, b or 1 rows; None where it has none.
        allowed_b1ts: visibility beyond causality, b or 1 rows, or None; must not make a later key visible.
        convolutions: weight and bias of Conv1 and of Conv2, weights as [out, in, 1, k].
        scale: factor of the scores.
        mask_hidden: whether the hidden layer is cut to what the query may see.
    """
    fine = torch.promote_types(q_butd.dtype, torch.float32)
    q, k, v, w1, c1, w2, c2 = (tensor.to(fine) for tensor in (q_butd, k_busd, v_buse, *convolutions))
    bias = None if bias_buts is None else bias_buts.to(fine)
    keep = torch.is_grad_enabled()
    with torch.autocast("cpu", enabled=False):
        return _attention(q, k, v, bias, allowed_b1ts, w1, c1, w2, c2, scale, mask_hidden, keep)[0]


class _Place(NamedTuple):
    """Where a block is: its queries, the key of the first of them, and how many keys it reads."""

    rows: slice
    first: int
    seen: int

    def sizes(self, batch: int, maps: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Of the scores, the hidden layer and the maps of a block."""
        count = self.rows.stop - self.rows.start
        return (batch, maps, count, self.seen), (batch, width, count * self.seen), (batch, maps, count, self.seen)

    def groups(self, batch: int) -> Iterator[slice]:
        """Rows of the batch that are computed together."""
        size = max(BLOCK_CELLS * torch.get_num_threads() // ((self.rows.stop - self.rows.start) * self.seen), 1)
        for start in range(0, batch, size):
            yield slice(start, min(start + size, batch))


def _places(queries: int, keys: int, w1: Tensor, mask_hidden: bool) -> list[_Place]:
    """All blocks. An uncut hidden layer is not 0 just beyond the visible keys, and Conv2 reads it: those are added."""
    spill = 0 if mask_hidden else w1.shape[-1] // 2
    before, start, found = keys - queries, 0, []
    while start < queries:
        count = min(max(BLOCK_CELLS // (before + start + LARGEST_BLOCK), 1), LARGEST_BLOCK)
        stop = min(start + count, queries)
        found.append(_Place(slice(start, stop), before + start, min(before + stop + spill, keys)))
        start = stop
    return found


class _Block:
    """One block of queries: what both passes need to know of it.

    Args:
        place: of the block.
        bias, allowed, w1: of the operator.
        maps: u; the first u input channels of Conv1 are the scores, the others the bias.
    """

    def __init__(self, place: _Place, bias: Tensor | None, allowed: Tensor | None, w1: Tensor, maps: int) -> None:
        rows, first, seen = place
        count = rows.stop - rows.start
        self.shape, self.kernel = (maps, count, seen), w1.shape[-1]
        self.bias = None if bias is None else bias[:, :, rows, :seen]
        self.w_scores, self.w_bias = inward(w1[:, :maps]), inward(w1[:, maps:])
        # Without a pattern only keys from the first query on can be hidden.
        self.open = first if allowed is None else 0
        later = torch.ones(count, seen - first, dtype=torch.bool, device=w1.device).triu(1)
        self.hidden_b1rs = later[None, None] if allowed is None else ~allowed[:, :, rows, :seen]
        self.alike = self.hidden_b1rs.shape[0] == 1 and (bias is None or bias.shape[0] == 1)

    def cut(self, x_gcrs: Tensor, group: slice, value: float = 0.0) -> None:
        """Put a value where the queries may not see, in place."""
        hidden = self.hidden_b1rs if self.hidden_b1rs.shape[0] == 1 else self.hidden_b1rs[group]
        x_gcrs[..., self.open :].masked_fill_(hidden, value)

    def cut_flat(self, x_gcn: Tensor, group: slice) -> None:
        """The same with 0 for an array of n cells."""
        self.cut(x_gcn.unflatten(2, self.shape[1:]), group)

    def bias_of(self, group: slice) -> Tensor:
        """[g or 1, u, r, s]."""
        assert self.bias is not None
        return self.bias if self.bias.shape[0] == 1 else self.bias[group]

    def read_bias(self, group: slice, scratch: Scratch) -> Tensor:
        """What Conv1 multiplies of the bias, [g, k·u, n], with 1 for g where the rows of the batch are alike."""
        count = 1 if self.alike else group.stop - group.start
        bias = scratch.take("bias", count, *self.shape).copy_(self.bias_of(group))
        self.cut(bias, group)
        return stack(bias, self.kernel, scratch)

    def share_of_bias(self, c1: Tensor, group: slice, scratch: Scratch) -> Tensor:
        """What Conv1 puts out without the scores, in a shape that broadcasts to [g, w, n]."""
        constant = c1[None, :, None]
        if self.bias is None:
            return constant
        product = _product(self.w_bias, self.read_bias(group, scratch), scratch, "share of bias")
        return product.add_(constant)


ALL = slice(0, 1)  # stands for every group of a block whose rows of the batch are alike


def _product(weight: Tensor, x_gcn: Tensor, scratch: Scratch, name: str) -> Tensor:
    """weight · x for every row of the batch, in a scratch array."""
    g, _, n = x_gcn.shape
    return torch.bmm(weight.expand(g, -1, -1), x_gcn, out=scratch.take(name, g, weight.shape[0], n))


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[b, u, t, e] with the memory of [b, t, u, e], which is what the output projection reads."""
    b, u, t, _ = q.shape
    return v.new_empty(b, t, u, v.shape[3]).transpose(1, 2)


@torch.library.custom_op("torchstone::dape_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    c2: Tensor,
    scale: float,
    mask_hidden: bool,
    keep: bool,
) -> list[Tensor]:
    """Output, then (with `keep`) the scores, the hidden layer and the maps of every block."""
    b, u, t, _ = q.shape
    out, w2_flat, scratch = _empty_output(q, v), outward(w2), Scratch(q)
    kept: list[Tensor] = []
    for place in _places(t, k.shape[2], w1, mask_hidden):
        rows, _, seen = place
        block = _Block(place, bias, allowed, w1, u)
        shared = block.share_of_bias(c1, ALL, scratch) if block.alike else None
        whole = [q.new_empty(size) for size in place.sizes(b, u, w1.shape[0])] if keep else []
        for group in place.groups(b):
            sizes = place.sizes(group.stop - group.start, u, w1.shape[0])
            used = (scratch.take(f"kept {number}", *size) for number, size in enumerate(sizes))
            scores, hidden, maps = (x[group] for x in whole) if keep else used
            _scores(q[group, :, rows], k[group, :, :seen], scale, out_gurs=scores)
            block.cut(scores, group)
            base = block.share_of_bias(c1, group, scratch) if shared is None else shared
            read = stack(scores, block.kernel, scratch)
            weight = block.w_scores.expand(read.shape[0], -1, -1)
            torch.baddbmm(base.expand_as(hidden), weight, read, out=hidden)
            F.leaky_relu_(hidden, SLOPE)
            if mask_hidden:
                block.cut_flat(hidden, group)
            product = _product(w2_flat, hidden, scratch, "product")
            final = unstack(product, block.shape, block.kernel, transposed=True)
            final += scores
            if bias is not None:
                final += block.bias_of(group)
            block.cut(final, group, -torch.inf)
            torch.softmax(final, -1, out=maps)
            out[group, :, rows] = maps @ v[group, :, :seen]
        kept += whole
    return [out, *kept]


def _scores(q_gurd: Tensor, k_gusd: Tensor, scale: float, out_gurs: Tensor) -> None:
    """scale · q kᵀ, written into place."""
    q_nrd, k_nsd = q_gurd.flatten(0, 1), k_gusd.flatten(0, 1)
    out_gurs.flatten(0, 1).baddbmm_(q_nrd, k_nsd.transpose(1, 2), beta=0, alpha=scale)


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    w1: Tensor,
    c1: Tensor,
    w2: Tensor,
    c2: Tensor,
    scale: float,
    mask_hidden: bool,
    keep: bool,
) -> list[Tensor]:
    b, u, t, _ = q.shape
    places = _places(t, k.shape[2], w1, mask_hidden) if keep else []
    sizes = [size for place in places for size in place.sizes(b, u, w1.shape[0])]
    return [_empty_output(q, v), *(q.new_empty(size) for size in sizes)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, bias, allowed, w1, _, w2, _, scale, mask_hidden, _ = inputs
    ctx.save_for_backward(q, k, v, bias, allowed, w1, w2, *output[1:])
    ctx.scale, ctx.mask_hidden = scale, mask_hidden
    ctx.set_materialize_grads(False)  # of what is kept; zeros of that size would cost a tenth of the step


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, bias, allowed, w1, w2, *kept = ctx.saved_tensors
    with torch.autocast("cpu", enabled=False):
        found = _attention_backward(grads[0], q, k, v, bias, allowed, w1, w2, kept, ctx.scale, ctx.mask_hidden)
    grad_q, grad_k, grad_v, grad_w1, grad_c1, grad_w2 = found[:6]
    grad_bias = None if bias is None else found[6]
    grad_c2 = w2.new_zeros(w2.shape[0])
    return grad_q, grad_k, grad_v, grad_bias, None, grad_w1, grad_c1, grad_w2, grad_c2, None, None, None


@torch.library.custom_op("torchstone::dape_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    kept: list[Tensor],
    scale: float,
    mask_hidden: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, W1, c1, W2 and (where there is one) of the bias."""
    b, u, t, _ = q.shape
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scratch = Scratch(q)
    conv = _ConvGradients(w1, w2, bias, scratch)
    for number, place in enumerate(_places(t, k.shape[2], w1, mask_hidden)):
        rows, _, seen = place
        block = _Block(place, bias, allowed, w1, u)
        of_scores, of_hidden, of_maps = kept[3 * number : 3 * number + 3]
        conv.begin(block, place)
        for group in place.groups(b):
            maps, grad_rows = of_maps[group], grad[group, :, rows]
            grad_v[group, :, :seen] += maps.mT @ grad_rows
            grad_final = scratch.take("maps", *maps.shape)
            torch.bmm(grad_rows.flatten(0, 1), v[group, :, :seen].flatten(0, 1).mT, out=grad_final.flatten(0, 1))
            torch._softmax_backward_data(grad_final, maps, -1, maps.dtype, grad_input=grad_final)
            grad_hidden = conv.second(grad_final, of_hidden[group], group)
            if mask_hidden:
                block.cut_flat(grad_hidden, group)
            grad_scores = conv.first(grad_hidden, of_scores[group], group).add_(grad_final)
            grad_q[group, :, rows] = (grad_scores @ k[group, :, :seen]).mul_(scale)
            grad_k[group, :, :seen] += (grad_scores.mT @ q[group, :, rows]).mul_(scale)
        conv.end()
    return [grad_q, grad_k, grad_v, *conv.results()]


class _ConvGradients:
    """Gradients of both convolutions and of the bias, added up over blocks: `begin`, groups of rows, `end`."""

    def __init__(self, w1: Tensor, w2: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        self.scratch = scratch
        self.w2_t, self.kernel = outward(w2).t(), w1.shape[-1]
        width, taps = w1.shape[0], self.w2_t.shape[1]
        self.w_scores, self.w_bias = w1.new_zeros(width, taps), w1.new_zeros(width, taps)
        self.c1, self.w2 = w1.new_zeros(width), w1.new_zeros(taps, width)
        self.bias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
        self.total: Tensor | None = None

    def begin(self, block: _Block, place: _Place) -> None:
        """The block of what follows."""
        self.block = block
        self.bias_rows = None if self.bias is None else self.bias[:, :, place.rows, : place.seen]
        shape = 1, self.c1.shape[0], block.shape[1] * block.shape[2]
        self.total = self.scratch.take("total", *shape).zero_() if block.alike else None

    def second(self, grad_gurs: Tensor, hidden_gwn: Tensor, group: slice) -> Tensor:
        """From the processed scores' gradient to that of Conv1's output [g, w, n]."""
        self._to_bias(grad_gurs, group)
        stacked = stack(grad_gurs, self.kernel, self.scratch, transposed=True)
        self.w2 += (stacked @ hidden_gwn.mT).sum(0)
        grad_gwn = _product(self.w2_t, stacked, self.scratch, "hidden")
        backward = torch.ops.aten.leaky_relu_backward.grad_input
        return backward(grad_gwn, hidden_gwn, SLOPE, True, grad_input=grad_gwn)

    def first(self, grad_gwn: Tensor, scores_gurs: Tensor, group: slice) -> Tensor:
        """From the gradient of Conv1's output to that of the scores that it read, [g, u, r, s]."""
        self.w_scores += (grad_gwn @ stack(scores_gurs, self.kernel, self.scratch).mT).sum(0)
        if self.total is None:
            self._share_of_bias(grad_gwn, group)
        else:
            _add_all(self.total, grad_gwn)
        return self._read(self.block.w_scores, grad_gwn, group)

    def end(self) -> None:
        """What rows of the batch that are alike have in common."""
        if self.total is not None:
            self._share_of_bias(self.total, ALL)

    def results(self) -> list[Tensor]:
        """Gradients of W1, c1, W2 and (where there is one) the bias."""
        parts = [self.w_scores] if self.bias is None else [self.w_scores, self.w_bias]
        w1 = torch.cat([as_weight_inward(part, self.kernel) for part in parts], dim=1)
        w2 = as_weight_outward(self.w2, self.kernel).contiguous()
        return [w1, self.c1, w2] if self.bias is None else [w1, self.c1, w2, self.bias]

    def _share_of_bias(self, grad_gwn: Tensor, group: slice) -> None:
        self.c1 += grad_gwn.sum((0, 2))
        if self.bias_rows is not None:
            self.w_bias += (grad_gwn @ self.block.read_bias(group, self.scratch).mT).sum(0)
            self._to_bias(self._read(self.block.w_bias, grad_gwn, group), group)

    def _read(self, weight: Tensor, grad_gwn: Tensor, group: slice) -> Tensor:
        """The gradient of visible input channels of Conv1, whose weights are given."""
        product = _product(weight.t(), grad_gwn, self.scratch, "product")
        grad_gurs = unstack(product, self.block.shape, self.kernel)
        self.block.cut(grad_gurs, group)
        return grad_gurs

    def _to_bias(self, grad_gurs: Tensor, group: slice) -> None:
        if self.bias_rows is None:
            return
        if self.bias_rows.shape[0] == 1:
            _add_all(self.bias_rows, grad_gurs)
        else:
            self.bias_rows[group] += grad_gurs


def _add_all(total_1: Tensor, x_g: Tensor) -> None:
    """Add every row of the batch to one, in place; a sum over rows would need memory of its own."""
    for row in x_g.unbind(0):
        total_1 += row


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    kept: list[Tensor],
    scale: float,
    mask_hidden: bool,
) -> list[Tensor]:
    found = [torch.empty_like(x) for x in (q, k, v)] + [x.new_empty(x.shape) for x in (w1, w1[:, 0, 0, 0], w2)]
    return found if bias is None else [*found, bias.new_empty(bias.shape)]


_attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.torchstone.dape_attention)
def _flops(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    bias: tuple[int, ...] | None,
    allowed: tuple[int, ...] | None,
    w1: tuple[int, ...],
    c1: tuple[int, ...],
    w2: tuple[int, ...],
    *_: Any,
    **__: Any,
) -> int:
    """Forward FLOPs, maps in full, as torch counts attention and convolutions."""
    b, u, t, d = q
    convolutions = w1[0] * w1[1] * w1[3] + w2[0] * w2[1] * w2[3]
    return 2 * b * t * k[2] * (u * (d + v[3]) + convolutions)


@register_flop_formula(torch.ops.torchstone.dape_attention_backward)
def _backward_flops(
    grad: tuple[int, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    bias: tuple[int, ...] | None,
    allowed: tuple[int, ...] | None,
    w1: tuple[int, ...],
    w2: tuple[int, ...],
    *_: Any,
    **__: Any,
) -> int:
    """Twice the forward pass; nothing is computed again."""
    return 2 * _flops(q, k, v, bias, allowed, w1, (), w2)
