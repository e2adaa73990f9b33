"""Span: where the tokens of one forward pass stand, and which of them may see each other.

Shapes: b batch · t query tokens of this call · s key tokens.

Everything is None on the plain path: tokens at positions 0…t-1 of one causal sequence. Only what is set costs
anything; in particular no mask is built on the plain path.

A decoder opens the span once per forward pass (`opened`), which gives it an empty cache. Masks and rotary tables
are then made by the first layer that needs them and shared by the others (`once`).

Pitfall: causality is by index in the sequence, rotation by `positions_bt`. They differ under left padding, where the
first real token has a positive index but position 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NOWHERE = -1  # segment of a token that takes no part: it sees nothing and nothing sees it


@dataclass(eq=False)
class Span:
    """Positions and visibility of the tokens of a forward pass.

    Attributes:
        positions_bt: int64 position of each token for the position part; None counts up from the state's length.
        documents_bt: integer id >= 0 of the document of each token; attention stays inside equal ids. When decoding
            step by step, give it in every call or in none.
        valid_bt: bool, False for padding. A padding token sees nothing, is not seen, and its attention output is 0.
        allowed_bts: bool pattern [t, s] or [b, t, s] that replaces the causal rule, True where a query may see a
            key (prefix attention, for example). Only for the parallel form, without a state.
        cache: what layers of one forward pass share; None outside a decoder. Use `opened`.
        auxiliary: losses that layers of one forward pass leave for the objective; None outside a decoder.
    """

    positions_bt: Tensor | None = None
    documents_bt: Tensor | None = None
    valid_bt: Tensor | None = None
    allowed_bts: Tensor | None = None
    cache: dict[Hashable, Any] | None = None
    auxiliary: list[Tensor] | None = None

    def opened(self) -> Span:
        """The same span with an empty cache, for one forward pass."""
        return Span(self.positions_bt, self.documents_bt, self.valid_bt, self.allowed_bts, {}, [])

    def leave(self, loss: Tensor) -> None:
        """Add a scalar to what training minimises, its coefficient included (load balance of experts, for example)."""
        if self.auxiliary is not None:
            self.auxiliary.append(loss)

    def left(self) -> Tensor | None:
        """The sum of what layers left; None if nothing."""
        return torch.stack(self.auxiliary).sum() if self.auxiliary else None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, computed at most once per key in an opened span."""
        if self.cache is None:
            return make()
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def segments(self) -> Tensor | None:
        """int64 [b, t] with equal ids where tokens may see each other and NOWHERE for padding; None if all may."""
        if self.documents_bt is None and self.valid_bt is None:
            return None
        if self.documents_bt is None:
            assert self.valid_bt is not None
            return self.valid_bt.long() - 1
        if self.valid_bt is None:
            return self.documents_bt.long()
        return self.documents_bt.long().masked_fill(~self.valid_bt, NOWHERE)
