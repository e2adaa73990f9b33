"""Key tokens of LongPPL and the characters that carry them to another tokenizer (Fang et al., arXiv 2410.23771, section 3).

    LSD_i = short loss − full loss of the evaluator        what the far context is worth to token i, in nats
    key      LSD_i > α  and  full loss_i < −β              both strict; α = 2, β = −2

Key tokens become intervals of characters, [start, end); an interval that starts exactly where another ends joins it. A token of
the evaluated model is key if it lies completely inside one interval; one that overlaps an interval in part is dropped.

Shapes: t tokens of a text, numpy arrays; nan where a token is not scored.

Pitfall: special tokens span no characters, so they are never part of an interval.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchstone.errors import DataError

NEAR = 0.05  # nats by which numerics may move a loss; see `near_threshold`
Interval = tuple[int, int]
Intervals = tuple[Interval, ...]
_PIECE = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*\]")


def key_tokens(
    full_t: NDArray[np.float32], short_t: NDArray[np.float32], alpha: float, beta: float
) -> NDArray[np.bool_]:
    """Which tokens are key; a token without a loss (nan) is not."""
    return (short_t - full_t > alpha) & (full_t < -beta)


def near_threshold(full_t: NDArray[np.float32], short_t: NDArray[np.float32], alpha: float, beta: float) -> int:
    """Tokens that are key with both thresholds 0.05 nats looser and not with both 0.05 stricter: rounding may decide them."""
    loose_t = key_tokens(full_t, short_t, alpha - NEAR, beta - NEAR)
    strict_t = key_tokens(full_t, short_t, alpha + NEAR, beta + NEAR)
    return int((loose_t & ~strict_t).sum())


def key_intervals(key_t: NDArray[np.bool_], spans: Sequence[Interval]) -> Intervals:
    """Characters of the key tokens, in order, neighbours joined."""
    found: list[Interval] = []
    for at in np.flatnonzero(key_t).tolist():
        start, end = spans[at]
        if start == end:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return tuple(found)


def inside(spans: Sequence[Interval], intervals: Sequence[Interval]) -> NDArray[np.bool_]:
    """Which tokens lie completely inside one interval; tokens without characters do not."""
    if not intervals or not spans:
        return np.zeros(len(spans), dtype=np.bool_)
    starts_k, ends_k = np.array(sorted(intervals)).T
    reach_k = np.maximum.accumulate(ends_k)  # the furthest end of an interval that starts no later
    start_t, end_t = np.array(spans).T
    before_t = np.searchsorted(starts_k, start_t, side="right") - 1
    return (before_t >= 0) & (reach_k[before_t.clip(min=0)] >= end_t) & (end_t > start_t)


def bigram_distances(ids: Sequence[int], key_t: NDArray[np.bool_], trunc_len: int, stride: int) -> list[int | None]:
    """For each key token, how many tokens back its bigram (the token before it, itself) last stood before the window.

    None where it did not: the token is then key for another reason than a repeated bigram.
    """
    earlier: dict[tuple[int, int], list[int]] = {}
    for at in range(1, len(ids)):
        earlier.setdefault((ids[at - 1], ids[at]), []).append(at)
    found: list[int | None] = []
    for at in np.flatnonzero(key_t).tolist():
        begins = (at - trunc_len) // stride * stride  # of the window that scored the token
        places = [place for place in earlier[ids[at - 1], ids[at]] if place - 1 < begins]
        found.append(at - places[-1] if places else None)
    return found


def format_intervals(intervals: Sequence[Interval]) -> str:
    """`[a, b];[c, d]`, the form of published sets."""
    return ";".join(f"[{start}, {end}]" for start, end in intervals)


def parse_intervals(line: str, length: int, where: str) -> Intervals:
    """Intervals of one document.

    Args:
        line: `[a, b];[c, d]`, with or without a last semicolon; empty: none.
        length: characters of the document.
        where: file and line, for messages.

    Raises:
        DataError: another form, intervals out of order, or beyond the text.
    """
    pieces = [piece.strip() for piece in line.strip().split(";") if piece.strip()]
    matches = [_PIECE.fullmatch(piece) for piece in pieces]
    for piece, match in zip(pieces, matches, strict=True):
        if match is None:
            raise DataError(f"{where} holds {piece!r}, which is no interval; write [start, end];[start, end].")
    found = tuple((int(match[1]), int(match[2])) for match in matches if match is not None)
    for (_, left), (start, end) in zip(((0, 0), *found), found, strict=False):
        if not (left <= start < end <= length):
            raise DataError(
                f"{where} holds the interval [{start}, {end}], and the text has {length:,} characters: intervals must ascend, "
                "hold a character and end within the text. They were made for another text; find the key tokens anew."
            )
    return found
