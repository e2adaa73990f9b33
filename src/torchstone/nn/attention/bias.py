"""ScoreBias: the position's bias on the scores of one attention call, made when and how a kernel wants it.

Shapes: b batch, or 1 where all rows agree · h heads · u query sub-heads, h or 2h · t queries · s keys.

The bias of a long sequence is as large as all its maps. A processor asks for a few rows at a time, a CUDA kernel for the
function of one score (`Position.score_term`); only the others hold the whole. Biases without parameters are made by the
first layer that needs them and shared by the others of a forward pass.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.nn.position.base import Offsets, Position, ScoreTerm
from torchstone.nn.span import Span
from torchstone.nn.state import Keys


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """The bias of one attention call.

    Attributes:
        position: what makes it.
        offsets: where queries and keys stand.
        span: of the forward pass, which keeps what layers share.
        key: equal for calls with equal offsets in this pass.
    """

    position: Position
    offsets: Offsets
    span: Span
    key: Hashable

    def whole(self) -> Tensor:
        """[b, h, t, s], fp32 or finer."""
        kind = self.position.bias_key()
        if kind is None:
            return self._of(self.offsets)
        return self.span.once(("bias", kind, self.key), lambda: self._of(self.offsets))

    def term(self) -> ScoreTerm | None:
        """The bias of one score as a function; see `Position.score_term`."""
        return self.position.score_term(self.offsets)

    def rows(self, rows: slice) -> Tensor:
        """[b, h, rows, s] of some queries."""
        if rows == slice(0, self.offsets.distance_ts.shape[0]):
            return self.whole()
        return self._of(Offsets(self.offsets.distance_ts[rows], self.offsets.position[..., rows]))

    def _of(self, offsets: Offsets) -> Tensor:
        bias = self.position.bias(offsets)
        assert bias is not None
        return bias if bias.dim() == 4 else bias.unsqueeze(0)


def parallel_bias(position: Position, span: Span, length: int, device: torch.device) -> ScoreBias | None:
    """The bias of a pass over `length` tokens without a state; None where the position has none."""
    if not position.biased:
        return None
    index = torch.arange(length, device=device)
    return _score_bias(position, span, index, index, ("bias offsets", length, device))


def step_bias(position: Position, span: Span, keys: Keys, queries: int, window: int | None) -> ScoreBias | None:
    """The bias of `queries` new tokens on the keys of a state that already holds the new ones."""
    if not position.biased:
        return None
    query_t = torch.arange(keys.offset, keys.offset + queries, device=keys.index_s.device)
    key = ("step bias offsets", keys.offset, queries, keys.index_s.shape[0], window, keys.ordered)
    return _score_bias(position, span, query_t, keys.index_s, key)


def _score_bias(position: Position, span: Span, query_t: Tensor, key_s: Tensor, key: Hashable) -> ScoreBias:
    def make() -> Offsets:
        given = query_t if span.positions_bt is None else span.positions_bt
        return Offsets(query_t[:, None] - key_s[None, :], given)

    return ScoreBias(position, span.once(key, make), span, key)
