"""Which query may see which key.

Shapes: b batch · t queries · s keys · 1 broadcast over heads.

A query sees a key when all of these hold: the key is not later (unless `Span.allowed_bts` says otherwise), it lies
within the sliding window, both are in the same segment (document), and neither is padding. Where nothing but
causality applies, no mask is built and the kernels' own causal mode is used; a single query of a decoding step needs
no mask at all, because its state holds only keys that it may see.

Pitfall: a row without any visible key has no softmax. Kernels answer with 0, NaN or an average, depending on the
device; here such rows are 0, always (`empty_b1t1`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.span import NOWHERE, Span
from torchstone.nn.state import Keys


@dataclass(eq=False)
class Mask:
    """Visibility for one attention call.

    Attributes:
        allowed_b1ts: bool, or None where everything (or everything causal) is visible. Rows that see nothing are
            True throughout, so that no kernel meets them; their result is then set to 0.
        empty_b1t1: bool, True for rows that see nothing; None where that cannot happen.
        causal: queries and keys are the same tokens, in order, and none sees a later one.
    """

    allowed_b1ts: Tensor | None
    empty_b1t1: Tensor | None
    causal: bool
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """0 where allowed and -inf elsewhere, made once per dtype; the form that kernels want."""
        if self.allowed_b1ts is None:
            return None
        allowed_b1ts = self.allowed_b1ts

        def make() -> Tensor:
            zeros = torch.zeros(allowed_b1ts.shape, dtype=dtype, device=allowed_b1ts.device)
            return zeros.masked_fill(~allowed_b1ts, -torch.inf)

        made: Tensor = self.once(dtype, make)
        return made

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A form of this mask that a kernel wants, made once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def biased(self, bias_buts: Tensor) -> Tensor:
        """The bias where a key is allowed and -inf elsewhere."""
        if self.allowed_b1ts is not None:
            return bias_buts.masked_fill(~self.allowed_b1ts, -torch.inf)
        if not self.causal:
            return bias_buts
        later = torch.ones(bias_buts.shape[-2:], dtype=torch.bool, device=bias_buts.device).triu(1)
        return bias_buts.masked_fill(later, -torch.inf)

    def clear_empty(self, out_bhtd: Tensor) -> Tensor:
        """Zeros for the rows that see nothing."""
        return out_bhtd if self.empty_b1t1 is None else out_bhtd.masked_fill(self.empty_b1t1, 0.0)


OPEN = Mask(None, None, causal=False)
CAUSAL = Mask(None, None, causal=True)


def parallel_mask(span: Span, length: int, window: int | None, device: torch.device) -> Mask:
    """The mask of a pass over `length` tokens without a state."""
    segments_bt = span.segments()
    if span.allowed_bts is None and segments_bt is None and (window is None or window >= length):
        return CAUSAL if length > 1 else OPEN

    def make() -> Mask:
        index = torch.arange(length, device=device)
        pattern = _causal(index, index) if span.allowed_bts is None else _given(span.allowed_bts, length)
        can_be_empty = span.allowed_bts is not None or span.valid_bt is not None
        mask = _combine(pattern, index, index, window, segments_bt, segments_bt, can_be_empty)
        mask.causal = span.allowed_bts is None
        return mask

    return span.once(("mask", length, window, device), make)


def step_mask(span: Span, keys: Keys, queries: int, window: int | None) -> Mask:
    """The mask of `queries` new tokens against the keys of a state that already holds the new ones.

    Raises:
        ConfigError: the span replaces the causal rule, which decoding step by step cannot honour.
    """
    if span.allowed_bts is not None:
        raise ConfigError(
            "Span.allowed_bts replaces the causal rule and was given together with a decoding state; "
            "decode causally, or run the whole sequence in one pass without a state."
        )
    if keys.segments_bs is None:
        if queries == 1:
            return OPEN
        if keys.index_s.shape[0] == queries and (window is None or window >= queries):
            return CAUSAL

    def make() -> Mask:
        query_t = torch.arange(keys.offset, keys.offset + queries, device=keys.index_s.device)
        new_bt = None if keys.segments_bs is None else _of_new(keys, queries)
        pattern = _causal(query_t, keys.index_s)
        return _combine(pattern, query_t, keys.index_s, window, new_bt, keys.segments_bs, True)

    return span.once(("step mask", keys.offset, keys.index_s.shape[0], queries, window, keys.ordered), make)


def _of_new(keys: Keys, queries: int) -> Tensor:
    """Segments of the new tokens, which a ring may hold anywhere."""
    assert keys.segments_bs is not None
    if keys.ordered:
        return keys.segments_bs[:, -queries:]
    order = keys.index_s.argsort()[-queries:]
    return keys.segments_bs[:, order]


def _causal(query_t: Tensor, key_s: Tensor) -> Tensor:
    return query_t[:, None] >= key_s[None, :]


def _given(allowed: Tensor, length: int) -> Tensor:
    if allowed.dtype != torch.bool or allowed.shape[-2:] != (length, length):
        raise ConfigError(
            f"Span.allowed_bts has type {allowed.dtype} and shape {tuple(allowed.shape)}; it must be bool of shape "
            f"[{length}, {length}] or [batch, {length}, {length}], True where a query may see a key."
        )
    return allowed if allowed.dim() == 2 else allowed[:, None]


def _combine(
    pattern: Tensor,
    query_t: Tensor,
    key_s: Tensor,
    window: int | None,
    segments_bt: Tensor | None,
    segments_bs: Tensor | None,
    can_be_empty: bool,
) -> Mask:
    allowed = pattern
    if window is not None:
        allowed = allowed & (query_t[:, None] - key_s[None, :] < window)
    if segments_bt is not None and segments_bs is not None:
        same_bts = (segments_bt[:, :, None] == segments_bs[:, None, :]) & (segments_bs != NOWHERE)[:, None, :]
        allowed = allowed & same_bts[:, None]
    if allowed.dim() == 2:
        allowed = allowed[None, None]
    if not can_be_empty:
        return Mask(allowed, None, causal=False)
    empty = ~allowed.any(dim=-1, keepdim=True)
    return Mask(allowed | empty, empty, causal=False)
