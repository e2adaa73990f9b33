"""One step of many tensors: a plain one, W ← W − η (d + λ W), or a rotational one.

The rotational update of a row W of norm N (Kosson et al., arXiv 2305.17212), d being the inner direction:

    d ← d − mean(d);   d ← d − W ⟨d, W⟩/N²;   q ← u q + (1−u) ‖d‖²;   W ← W − θ N d / (√(q/(1−u^t)) + ε);   rescale W to N

Row by row this is W ← α W − β d with two numbers that follow from ⟨d, W⟩, ‖d‖² and ‖W‖², since d, its radial part and W span a
plane: so a row is read once for the three products and once for the update.

Two ways lead to equal results up to rounding: tensor operations, several tensors at a time (`torch._foreach_*`), and on the CPU a
compiled kernel (`optim.momentum_native`). Without the kernel, tensors on the CPU go in blocks of rows that stay in the cache.

Shapes: r rows · c values of a row.

Pitfall: a direction that has no part at a right angle to its row beyond rounding (zero gradient and momentum; rows of two values
that are centred) turns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from torchstone.optim import momentum_native as native
from torchstone.optim.momentum_direction import Direction

BLOCK = 1 << 18  # values of a block on the CPU: 1 MiB each of weight, gradient, moment and direction in fp32
RADIAL = 1e-6  # share of ‖d‖² below which what is left beside the radial part is rounding


@dataclass(frozen=True)
class Plain:
    """Rate of d, decay ηλ of the weights, and λ where it goes through the gradient instead."""

    lr: float
    decay: float
    coupled: float = 0.0


@dataclass(frozen=True)
class Turn:
    """Target angle θ, u of the average of ‖d‖², its correction 1−u^t, ε, and whether directions are centred."""

    theta: float
    average: float
    correction: float
    tiny: float
    centred: bool


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor with what belongs to them.

    Attributes:
        w_rc, g_rc, m_rc: weight, gradient, momentum. v_rc: second moment, where the rule has one.
        norm_r1, square_r1: N and q of a rotational update.
        rate: multiplies learning rate and decay, or the angle, of this tensor alone.
    """

    w_rc: Tensor
    g_rc: Tensor
    m_rc: Tensor
    v_rc: Tensor | None = None
    norm_r1: Tensor | None = None
    square_r1: Tensor | None = None
    rate: float = 1.0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors."""
        return self.w_rc, self.g_rc, self.m_rc, self.v_rc, self.norm_r1, self.square_r1

    def blocks(self, rows: int) -> Iterator[Piece]:
        """The same in pieces of so many rows at most."""
        for start in range(0, self.w_rc.shape[0], rows):
            w_rc, g_rc, m_rc = (value[start : start + rows] for value in (self.w_rc, self.g_rc, self.m_rc))
            v_rc, norm_r1, square_r1 = (
                None if value is None else value[start : start + rows]
                for value in (self.v_rc, self.norm_r1, self.square_r1)
            )
            yield Piece(w_rc, g_rc, m_rc, v_rc, norm_r1, square_r1, self.rate)


def update(pieces: Sequence[Piece], direction: Direction, how: Plain | Turn, fused: bool) -> None:
    """Update weights and state in place; with `fused` by the kernel wherever it fits."""
    fits = [fused and _fits(piece) and native.library() is not None for piece in pieces]
    fast = [piece for piece, fit in zip(pieces, fits, strict=True) if fit]
    if fast:
        _run_native(fast, direction, how)
    room = torch.empty(0 if all(fits) else BLOCK)
    for batch in _batches([piece for piece, fit in zip(pieces, fits, strict=True) if not fit]):
        if isinstance(how, Plain):
            _plain(batch, direction, how, room)
        else:
            _turn(batch, direction, how, room)


def _fits(piece: Piece) -> bool:
    return all(
        value is None
        or (
            type(value) in (Tensor, nn.Parameter)
            and value.device.type == "cpu"
            and value.dtype == torch.float32
            and value.is_contiguous()
            and (value.data_ptr() != 0 or value.numel() == 0)
        )
        for value in piece.tensors()
    )


def _run_native(pieces: Sequence[Piece], direction: Direction, how: Plain | Turn) -> None:
    rows = [
        (*(0 if value is None else value.data_ptr() for value in (p.w_rc, p.m_rc, p.v_rc, p.g_rc, p.norm_r1, p.square_r1)),
         *p.w_rc.shape, p.rate)
        for p in pieces
    ]  # fmt: skip
    settings = native.Settings()
    for part in (direction, how):
        for field, value in zip(fields(part), astuple(part), strict=True):
            if field.name != "normaliser":
                setattr(settings, field.name, value)
    native.run(isinstance(how, Turn), np.array(rows, native.RECORD), settings, direction.normaliser)


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """All tensors of one type on one accelerator together; on the CPU as many rows of one type as stay in the cache."""
    places: dict[tuple[torch.device, torch.dtype], list[Piece]] = {}
    for piece in pieces:
        places.setdefault((piece.w_rc.device, piece.w_rc.dtype), []).append(piece)
    for (device, _), found in places.items():
        yield from [found] if device.type != "cpu" else _blocks(found)


def _blocks(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        for block in piece.blocks(max(1, BLOCK // max(1, piece.w_rc.shape[1]))):
            if batch and held + block.w_rc.numel() > BLOCK:
                yield batch
                batch, held = [], 0
            batch.append(block)
            held += block.w_rc.numel()
    if batch:
        yield batch


def _copies(values: Sequence[Tensor], room: Tensor) -> list[Tensor]:
    """Copies in the room where they fit: new memory costs more than the arithmetic on it."""
    sizes = [value.numel() for value in values]
    if values[0].device != room.device or values[0].dtype != room.dtype or sum(sizes) > room.numel():
        return [value.clone() for value in values]
    parts = room[: sum(sizes)].split(sizes)
    copies = [part.view_as(value) for part, value in zip(parts, values, strict=True)]
    torch._foreach_copy_(copies, list(values))
    return copies


def _directions(
    pieces: Sequence[Piece], rule: Direction, room: Tensor, coupled: float = 0.0
) -> tuple[list[Tensor], float]:
    """d of every piece up to a common factor, and the factor; moments move on."""
    grads, moments = [piece.g_rc for piece in pieces], [piece.m_rc for piece in pieces]
    if coupled:
        grads = list(torch._foreach_add(grads, [piece.w_rc for piece in pieces], alpha=coupled))
    found = _copies(moments, room)
    if math.isclose(rule.moment + rule.gradient, 1):
        torch._foreach_lerp_(found, grads, rule.gradient)
    else:
        torch._foreach_mul_(found, rule.moment)
        torch._foreach_add_(found, grads, alpha=rule.gradient)
    if math.isclose(rule.keep + rule.take, 1):
        torch._foreach_lerp_(moments, grads, rule.take)
    else:
        torch._foreach_mul_(moments, rule.keep)
        torch._foreach_add_(moments, grads, alpha=rule.take)
    if rule.normaliser == "sign":
        unknown = torch._foreach_mul(found, 0.0)  # not a number where there is none, which a sign would hide
        torch._foreach_sign_(found)
        torch._foreach_add_(found, unknown)
    if rule.normaliser != "rms":
        return found, rule.scale
    squares = [piece.v_rc for piece in pieces if piece.v_rc is not None]
    torch._foreach_mul_(squares, rule.beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - rule.beta2)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, rule.eps / rule.root)
    torch._foreach_div_(found, roots)
    return found, rule.scale / rule.root


def _plain(pieces: Sequence[Piece], rule: Direction, how: Plain, room: Tensor) -> None:
    weights = [piece.w_rc for piece in pieces]
    found, scale = _directions(pieces, rule, room, how.coupled)
    torch._foreach_mul_(weights, [1 - how.decay * piece.rate for piece in pieces])
    torch._foreach_mul_(found, [how.lr * scale * piece.rate for piece in pieces])
    torch._foreach_sub_(weights, found)


def _turn(pieces: Sequence[Piece], rule: Direction, how: Turn, room: Tensor) -> None:
    weights = [piece.w_rc for piece in pieces]
    found, scale = _directions(pieces, rule, room)
    if how.centred:
        torch._foreach_sub_(found, [d_rc.mean(1, keepdim=True) for d_rc in found])
    norms = [piece.norm_r1 for piece in pieces if piece.norm_r1 is not None]
    squares = [piece.square_r1 for piece in pieces if piece.square_r1 is not None]
    sizes = [len(norm_r1) for norm_r1 in norms]
    products = torch.stack([
        torch.cat([torch.linalg.vecdot(d_rc, w_rc) for d_rc, w_rc in zip(found, weights, strict=True)]) * scale,
        torch.cat([torch.linalg.vector_norm(d_rc, dim=1) for d_rc in found]).mul_(scale).square_(),
        torch.cat([torch.linalg.vector_norm(w_rc, dim=1) for w_rc in weights]).square_(),
    ]).unsqueeze(-1)  # fmt: skip
    norm_r1, square_r1 = torch.cat(norms), torch.cat(squares)
    theta_r1 = torch.cat([torch.full_like(n, how.theta * p.rate) for n, p in zip(norms, pieces, strict=True)])
    of_w_r1, of_d_r1, square_r1 = _coefficients(products, norm_r1, square_r1, theta_r1, how)
    torch._foreach_copy_(squares, square_r1.split(sizes))
    torch._foreach_mul_(weights, of_w_r1.split(sizes))
    torch._foreach_mul_(found, (of_d_r1 * scale).split(sizes))
    torch._foreach_sub_(weights, found)


def _coefficients(
    products: Tensor, norm_r1: Tensor, square_r1: Tensor, theta_r1: Tensor, how: Turn
) -> tuple[Tensor, Tensor, Tensor]:
    """α and β of W ← αW − βd, and the new q, from ⟨d, W⟩, ‖d‖², ‖W‖² of every row."""
    dot, dd, ww = products
    along = dot / norm_r1.square()
    side = dd - 2 * along * dot + along.square() * ww
    side = torch.where(side > RADIAL * dd, side, 0.0)
    square_r1 = how.average * square_r1 + (1 - how.average) * side
    size = (square_r1 / how.correction).sqrt_().add_(how.tiny)
    b = torch.where(side > 0, theta_r1 * norm_r1 / size, 0.0)
    a = 1 + b * along
    back = norm_r1 / (a.square() * ww - 2 * a * b * dot + b.square() * dd).sqrt()
    return back * a, back * b, square_r1


def correction_of(average: float, step: int) -> float:
    """1 − u^t, by which q is divided."""
    return 1 - math.pow(average, step)
