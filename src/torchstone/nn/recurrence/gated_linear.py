"""Gated linear attention: a matrix as state, whose rows decay by a gate of their own.

    S_t = diag(exp g_t) S_{t−1} + k_tᵀ v_t,   o_t = s · q_t S_t

with log gates g ≤ 0 (Yang et al., arXiv 2312.06635; HGRN2, Qin et al., arXiv 2404.07904, is the case k = 1 − exp g).

Written out, o_t = s Σ_{j≤t} (q_t ⊙ exp(g_{j+1} + … + g_t)) k_jᵀ v_j. The factored form (q e^{G}) (k e^{−G})ᵀ of the running sum
G overflows as soon as a chunk has decayed by e^{−88}, and differences of running sums lose digits before that. Here nothing
is ever divided and no two sums are subtracted. Blocks of tokens double in size, from one token up to a chunk, and each keeps

    q̃_t = q_t ⊙ decay from the block's start up to t        k̃_j = k_j ⊙ decay after j to the block's end

Two neighbours that become one block meet at the border between them: the second half reads the first by q̃ k̃ᵀ v, and then q̃
of the second half decays by all of the first, and k̃ of the first half by all of the second. Every decay is a product of numbers
≤ 1. Where it underflows, 0 is the right answer; no causal mask is needed, and no masked half is computed. Chunks read the
state of the chunk before by q̃ S and hand on diag(decay) S + k̃ᵀ v, in order.

A document starts with an empty state: its first token has the gate 0, so that no product passes it. That is exact, and safe
with a log gate of −∞, because log gates are only ever added up and exponentiated. Padding is a gate of 1 with k = 0.

Gradients go the same way back, from chunks down to tokens. The passes save their inputs alone and make the rest again. The
gradient of a log gate sums what was read or written across it, with no cancellation between queries and keys.

Shapes: b batch · t tokens · h heads · k key channels · v value channels · r rows (b·h) · n chunks · p = r·n · c tokens of a
chunk · m pairs of blocks · s tokens of a block.

Pitfalls: the arithmetic is fp32, or fp64 for fp64 inputs, whatever the model's type, under autocast too. Chunks are powers of
two and get smaller where a row would need much padding (`chunk_of`). The state grows with k·v: the time of short rows with
wide heads goes into it. There is no second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SMALLEST, LARGEST = 8, 64  # tokens of a chunk that is chosen here
TINY = 2  # tokens of a block whose products are not left to a library


def gated_linear_attention(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    starts_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [b, t, h, v] and the state after the last token [b, h, k, v], both in fp32 or finer.

    Args:
        q_bthk, k_bthk, v_bthv: queries, keys and values.
        g_bthk: log gates, at most 0; −∞ empties a row of the state.
        state_bhkv: state before the first token; None for an empty one.
        scale: factor of the outputs; None: k^(−1/2).
        chunk: most tokens of a chunk, a power of two; None: what suits the key channels (`chunk_of`).
        starts_bt: bool, b or 1 rows; True where the state must be empty before the token.
    """
    tensors, scale = _prepared(q_bthk, k_bthk, v_bthv, g_bthk, state_bhkv, scale)
    q, k, v, g, state = tensors
    if starts_bt is not None:
        g = g.masked_fill(starts_bt[:, :, None, None], -torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        return _attention(q, k, v, g, state, scale, chunk)


def gated_linear_recurrence(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    g_bthk: Tensor,
    state_bhkv: Tensor | None = None,
    scale: float | None = None,
    starts_bt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same token by token, which is how a single token is decoded."""
    tensors, scale = _prepared(q_bthk, k_bthk, v_bthv, g_bthk, state_bhkv, scale)
    q, k, v, g, state = tensors
    if starts_bt is not None:
        g = g.masked_fill(starts_bt[:, :, None, None], -torch.inf)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for q_bhk, k_bhk, v_bhv, f_bhk in zip(*(x.unbind(1) for x in (q * scale, k, v, g.exp())), strict=True):
            state = f_bhk[..., None] * state + k_bhk[..., None] * v_bhv[..., None, :]
            outputs.append((q_bhk[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, scale: float | None
) -> tuple[list[Tensor], float]:
    """All tensors in one fine type, the state among them, and the scale as a number."""
    fine = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=fine)
    return [x.to(fine) for x in (q, k, v, g, state)], k.shape[3] ** -0.5 if scale is None else scale


def chunk_of(length: int, keys: int, chunk: int | None = None) -> int:
    """Tokens of a chunk for rows of this length, at most `chunk` where that is given.

    Work per token grows with the chunk and, through the states in between, with keys / chunk: they balance near
    chunk = keys. A chunk is halved as long as it would pad a row by more than an eighth.
    """
    if chunk is None:
        chunk = min(max(1 << (keys - 1).bit_length(), SMALLEST), LARGEST)
    while chunk > SMALLEST and -length % chunk > length // 8:
        chunk //= 2
    return chunk


def core_flops(length: int, keys: int, values: int, chunk: int | None = None) -> float:
    """FLOPs per token of one head, padding included: state read and written, and pairs of tokens within a chunk.

    A pair costs a product of q and k and one with v; a token has (c + 1)/2 of them on average, itself among them.
    """
    used = chunk_of(length, keys, chunk)
    padded = (length + -length % used) / length
    return padded * (4 * keys * values + (used + 1) * (keys + values))


# The operators ------------------------------------------------------------------------------------


@torch.library.custom_op("torchstone::gated_linear_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state."""
    return forward(q, k, v, g, state, scale, chunk)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, chunk: int | None
) -> tuple[Tensor, Tensor]:
    return _empty_like(v), state.new_empty(state.shape)


@torch.library.custom_op("torchstone::gated_linear_attention_backward", mutates_args=())
def _attention_backward(
    by_o: Tensor,
    by_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the first state."""
    return backward(by_o, by_last, q, k, v, g, state, scale, chunk)


@_attention_backward.register_fake
def _(
    by_o: Tensor,
    by_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v), _empty_like(g), state.new_empty(state.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale, ctx.chunk = inputs[5:]


def _derive(ctx: Any, by_o: Tensor, by_last: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(by_o.device.type, enabled=False):
        found = _attention_backward(by_o, by_last, *ctx.saved_tensors, ctx.scale, ctx.chunk)
    return (*found, None, None)


_attention.register_autograd(_derive, setup_context=_keep)


@register_flop_formula(torch.ops.torchstone.gated_linear_attention)
def _flops(q: Any, k: Any, v: Any, g: Any, state: Any, scale: float, chunk: int | None, **kwargs: Any) -> int:
    b, t, h, keys = q
    return round(b * t * h * core_flops(t, keys, v[3], chunk))


def _empty_like(x_bthk: Tensor) -> Tensor:
    """As `_unfolded` leaves it."""
    return x_bthk.new_empty(x_bthk.shape)


# Layout -------------------------------------------------------------------------------------------


def _folded(x_bthk: Tensor, chunk: int) -> Tensor:
    """[p, c, k], with zeros behind the last token."""
    t, size = x_bthk.shape[1], x_bthk.shape[3]
    x_bhtk = x_bthk.transpose(1, 2)
    if t % chunk:
        x_bhtk = F.pad(x_bhtk, (0, 0, 0, -t % chunk))
    return x_bhtk.reshape(-1, chunk, size).contiguous()


def _unfolded(x_pck: Tensor, b: int, t: int, h: int) -> Tensor:
    """[b, t, h, k] without the padding."""
    _, chunk, size = x_pck.shape
    return x_pck.view(b, h, t + -t % chunk, size)[:, :, :t].transpose(1, 2).contiguous()


class _Pair(NamedTuple):
    """The border of every two neighbouring blocks, before they become one."""

    size: int
    q_msk: Tensor
    k_msk: Tensor
    first_m1k: Tensor
    second_m1k: Tensor

    def first(self, x_pck: Tensor) -> Tensor:
        """The first halves [m, s, k] of an array, as a view."""
        return x_pck.view(-1, 2, self.size, x_pck.shape[-1])[:, 0]

    def second(self, x_pck: Tensor) -> Tensor:
        """The second halves."""
        return x_pck.view(-1, 2, self.size, x_pck.shape[-1])[:, 1]


class _Blocks:
    """Blocks that double: queries decayed since the start of their block, keys decayed to its end, and the decay of all.

    Args:
        q_pck, k_pck, g_pck: of whole chunks.
    """

    def __init__(self, q_pck: Tensor, k_pck: Tensor, g_pck: Tensor) -> None:
        self.log_m1k = g_pck.view(-1, 1, g_pck.shape[-1])
        self.decay_m1k = self.log_m1k.exp()
        self.q_pck, self.k_pck = q_pck * self.decay_m1k.view_as(q_pck), k_pck.clone()

    def pairs(self) -> Iterator[_Pair]:
        """Every border, smallest blocks first. What a pair shows changes in place when the next one is asked for."""
        size, keys = 1, self.q_pck.shape[-1]
        while size < self.q_pck.shape[1]:
            first_m1k, second_m1k = self.decay_m1k.view(-1, 2, 1, keys).unbind(1)
            q_msk = self.q_pck.view(-1, 2, size, keys)[:, 1]
            k_msk = self.k_pck.view(-1, 2, size, keys)[:, 0]
            yield _Pair(size, q_msk, k_msk, first_m1k, second_m1k)
            q_msk.mul_(first_m1k)
            k_msk.mul_(second_m1k)
            self.log_m1k = self.log_m1k.view(-1, 2, 1, keys).sum(1)
            self.decay_m1k, size = self.log_m1k.exp(), 2 * size


def _mixed(weights_mss: Tensor, x_msk: Tensor) -> Tensor:
    """weights · x. Libraries for products of matrices are slow where a matrix has one or two rows."""
    size = x_msk.shape[1]
    if size > TINY:
        return torch.bmm(weights_mss, x_msk)
    mixed_msk = weights_mss[:, :, :1] * x_msk[:, :1]
    for row in range(1, size):
        mixed_msk.addcmul_(weights_mss[:, :, row : row + 1], x_msk[:, row : row + 1])
    return mixed_msk


def _walk(
    write_pkv: Tensor, decay_pk1: Tensor, start_bhkv: Tensor, chunks: int, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """States before every chunk [p, k, v] and after the last one, of state ← decay ⊙ state + write.

    Args:
        write_pkv, decay_pk1, start_bhkv: what a chunk adds, what it leaves of the state, and the first state.
        chunks: of a row.
        backwards: from the last chunk to the first, as gradients go.
    """
    start_rkv = start_bhkv.flatten(0, 1)
    rows, order = start_rkv.shape[0], -1 if backwards else 1
    before_pkv = torch.empty_like(write_pkv)
    write, decay, before = (
        x.view(rows, chunks, *x.shape[1:]).unbind(1)[::order] for x in (write_pkv, decay_pk1, before_pkv)
    )
    before[0].copy_(start_rkv)
    for step in range(1, len(before)):
        torch.addcmul(write[step - 1], decay[step - 1], before[step - 1], out=before[step])
    return before_pkv, torch.addcmul(write[-1], decay[-1], before[-1]).view_as(start_bhkv)


# The two passes -----------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state; arguments as in `gated_linear_attention`, all of one type."""
    b, t, h, keys = q.shape
    used = chunk_of(t, keys, chunk)
    q_pck, k_pck, v_pcv, g_pck = (_folded(x, used) for x in (q * scale, k, v, g))
    o_pcv = (q_pck * k_pck).sum(-1, keepdim=True) * v_pcv
    blocks = _Blocks(q_pck, k_pck, g_pck)
    for pair in blocks.pairs():
        scores_mss = torch.bmm(pair.q_msk, pair.k_msk.mT)
        pair.second(o_pcv).add_(_mixed(scores_mss, pair.first(v_pcv)))
    before_pkv, last_bhkv = _walk(torch.bmm(blocks.k_pck.mT, v_pcv), blocks.decay_m1k.mT, state, -(-t // used))
    return _unfolded(torch.baddbmm(o_pcv, blocks.q_pck, before_pkv), b, t, h), last_bhkv


def backward(
    by_o: Tensor,
    by_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and the first state, from those of the outputs and of the last state."""
    b, t, h, keys = q.shape
    used = chunk_of(t, keys, chunk)
    q_pck, k_pck, v_pcv, g_pck, by_o_pcv = (_folded(x, used) for x in (q, k, v, g, by_o * scale))
    blocks = _Blocks(q_pck, k_pck, g_pck)
    f_pck = blocks.decay_m1k.view_as(g_pck)
    pairs = [pair._replace(q_msk=pair.q_msk.clone(), k_msk=pair.k_msk.clone()) for pair in blocks.pairs()]
    decay_pk1, chunks = blocks.decay_m1k.mT, -(-t // used)
    before_pkv, _ = _walk(torch.bmm(blocks.k_pck.mT, v_pcv), decay_pk1, state, chunks)
    by_after_pkv, by_state = _walk(torch.bmm(blocks.q_pck.mT, by_o_pcv), decay_pk1, by_last, chunks, backwards=True)
    by_q_pck = torch.bmm(by_o_pcv, before_pkv.mT)
    by_k_pck = torch.bmm(v_pcv, by_after_pkv.mT)
    by_v_pcv = torch.bmm(blocks.k_pck, by_after_pkv)
    by_total_m1k = (decay_pk1 * (before_pkv * by_after_pkv).sum(-1, keepdim=True)).mT
    for pair in reversed(pairs):
        by_total_m1k = _descend(pair, by_q_pck, by_k_pck, by_v_pcv, by_total_m1k, v_pcv, by_o_pcv)
    by_q_pck *= f_pck
    by_g_pck = by_total_m1k.view_as(g_pck) + by_q_pck * q_pck
    own_pc1 = (by_o_pcv * v_pcv).sum(-1, keepdim=True)
    by_q_pck.addcmul_(own_pc1, k_pck)
    by_k_pck.addcmul_(own_pc1, q_pck)
    by_v_pcv.addcmul_((q_pck * k_pck).sum(-1, keepdim=True), by_o_pcv)
    found = (_unfolded(x, b, t, h) for x in (by_q_pck, by_k_pck, by_v_pcv, by_g_pck))
    return (*found, by_state)  # type: ignore[return-value]


def _summed(x_msk: Tensor) -> Tensor:
    """Over the tokens of a block, [m, 1, k]."""
    return x_msk if x_msk.shape[1] == 1 else x_msk.sum(1, keepdim=True)


def _descend(
    pair: _Pair,
    by_q_pck: Tensor,
    by_k_pck: Tensor,
    by_v_pcv: Tensor,
    by_total_m1k: Tensor,
    v_pcv: Tensor,
    by_o_pcv: Tensor,
) -> Tensor:
    """Gradients of blocks become those of their halves, in place; the gradient of the halves' log decays."""
    by_q_msk, by_k_msk = pair.second(by_q_pck), pair.first(by_k_pck)
    v_msv, by_o_msv = pair.first(v_pcv), pair.second(by_o_pcv)
    by_q_msk.mul_(pair.first_m1k)
    by_k_msk.mul_(pair.second_m1k)
    by_halves_m21k = by_total_m1k.new_empty(len(by_total_m1k), 2, 1, by_total_m1k.shape[-1])
    torch.add(by_total_m1k, _summed(by_q_msk * pair.q_msk), out=by_halves_m21k[:, 0])
    torch.add(by_total_m1k, _summed(by_k_msk * pair.k_msk), out=by_halves_m21k[:, 1])
    scores_mss = torch.bmm(pair.q_msk, pair.k_msk.mT)
    by_scores_mss = torch.bmm(by_o_msv, v_msv.mT)
    pair.first(by_v_pcv).add_(_mixed(scores_mss.mT, by_o_msv))
    by_q_msk.add_(_mixed(by_scores_mss, pair.k_msk))
    by_k_msk.add_(_mixed(by_scores_mss.mT, pair.q_msk))
    return by_halves_m21k.flatten(0, 1)
