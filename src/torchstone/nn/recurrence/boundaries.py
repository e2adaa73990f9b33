"""Where documents start and where padding is, as a recurrence needs to know it.

Shapes: b batch · t tokens · 1 where all rows agree.

Attention hides other documents by a mask; a recurrence has to empty its state where a document starts. A token starts a
document when its segment differs from that of the visible token before it in its row, in this call or, through the state, in
an earlier one; the first visible token of a row always does. Padding changes nothing: the state passes it by.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.recurrence.state import UNSEEN, RecurrentState
from torchstone.nn.span import NOWHERE, Span


class Boundaries(NamedTuple):
    """Starts and padding of the tokens of one call.

    Attributes:
        starts_bt: bool, [b, t] or [1, t]: True where the state must be empty before the token.
        valid_bt: bool [b, t], False for padding; None where there is none.
        plain: neither documents nor padding were given, so that only index 0 can be a start.
        last_b: int64 [b]: document of each row's last visible token, which the state keeps.
    """

    starts_bt: Tensor
    valid_bt: Tensor | None
    plain: bool
    last_b: Tensor


def boundaries(span: Span, batch: int, length: int, state: RecurrentState | None, device: torch.device) -> Boundaries:
    """Boundaries of `length` new tokens in each of `batch` rows.

    Raises:
        ConfigError: the span replaces the causal rule, or its positions restart without documents.
    """
    if span.allowed_bts is not None:
        raise ConfigError(
            "Span.allowed_bts replaces the causal rule, which a recurrent mixer cannot do: it reads tokens in order; use "
            "attention for such a pattern, or drop it."
        )
    seen = 0 if state is None else state.length
    before_b = None if state is None else state.documents_b

    def make() -> Boundaries:
        _check_positions(span)
        segments_bt = span.segments()
        if segments_bt is None:
            return _plain(batch, length, before_b, device)
        return _segmented(segments_bt.expand(batch, -1), before_b)

    # layers of one pass agree: their states have seen the same tokens
    return span.once(("boundaries", batch, length, seen, device), make)


def _plain(batch: int, length: int, before_b: Tensor | None, device: torch.device) -> Boundaries:
    index_1t = torch.arange(length, device=device)[None]
    zero_b = torch.zeros(batch, dtype=torch.long, device=device)
    if before_b is None:
        return Boundaries(index_1t == 0, None, True, zero_b)
    # tokens without a segment belong to segment 0, as in KVCache, whatever document came before
    fresh_b1 = (before_b != 0)[:, None]
    return Boundaries((index_1t == 0) & fresh_b1, None, True, zero_b)


def _segmented(segments_bt: Tensor, before_b: Tensor | None) -> Boundaries:
    if before_b is None:
        before_b = segments_bt.new_full((segments_bt.shape[0],), UNSEEN)
    valid_bt = segments_bt != NOWHERE
    index_t = torch.arange(segments_bt.shape[1], device=segments_bt.device)
    # index of the last visible token up to each place, -1 before the first
    latest_bt = torch.where(valid_bt, index_t, -1).cummax(dim=1).values
    earlier_bt = torch.cat([torch.full_like(latest_bt[:, :1], -1), latest_bt[:, :-1]], dim=1)
    known_bt = segments_bt.gather(1, earlier_bt.clamp_min(0))
    previous_bt = torch.where(earlier_bt < 0, before_b[:, None], known_bt)
    last_b1 = segments_bt.gather(1, latest_bt[:, -1:].clamp_min(0))
    last_b = torch.where(latest_bt[:, -1] < 0, before_b, last_b1.squeeze(1))
    return Boundaries(valid_bt & (segments_bt != previous_bt), valid_bt, False, last_b)


def _check_positions(span: Span) -> None:
    """Raise ConfigError if a visible token's position is not above those before it and nothing says where documents are.

    Not asked while a compiler traces, because the answer depends on values: such positions pass unnoticed there.
    """
    positions_bt = span.positions_bt
    if positions_bt is None or span.documents_bt is not None or torch.compiler.is_compiling():
        return
    if positions_bt.shape[-1] < 2 or positions_bt.device.type == "meta":
        return
    if span.valid_bt is None:
        restarts_bt = positions_bt[..., 1:] <= positions_bt[..., :-1]
    else:
        seen_bt = torch.where(span.valid_bt, positions_bt, torch.iinfo(positions_bt.dtype).min)
        highest_bt = seen_bt.cummax(dim=-1).values
        restarts_bt = span.valid_bt[..., 1:] & (seen_bt[..., 1:] <= highest_bt[..., :-1])
    if bool(restarts_bt.any()):
        raise ConfigError(
            "positions restart within a row and no documents are given; a recurrent mixer would carry its state from one "
            "document into the next: give Span.documents_bt (data.mask_documents: true), or positions that count on."
        )
