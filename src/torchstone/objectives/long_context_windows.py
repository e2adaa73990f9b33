"""Short-context windows: the rule of LongPPL and LongCE (arXiv 2410.23771) for rows of any length, as batches.

Ids 0 … T-1, `trunc_len` K and `stride` S. For start a = 0, S, 2S, … while a < T - K: the model reads ids[a : e] with
e = min(a + K + S, T), and its losses of targets a + K … e - 1 are the short ones. So each target from K on is scored once, with
K to K + S - 1 tokens before it, and the first K never.

All windows but the last are equally long, so they stack into one batch; the last may be shorter and stands alone, so that
nothing is padded. It may hold a single target.

Shapes: b rows · t ids of a row · n windows of a row · w ids of a window.

Pitfall: a window starts in the middle of a text, and no special token is put before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchstone.errors import ConfigError

ShortLosses = Callable[[Tensor, int], Tensor]
"""(one thing per window, targets at its end) → losses of those targets [windows, targets]."""


def check_windows(trunc_len: int, stride: int) -> None:
    """Raise ConfigError for lengths that make no windows."""
    for name, value in (("stride", stride), ("trunc_len", trunc_len)):
        if value < 1:
            raise ConfigError(f"{name} was given as {value}; it must be at least 1 token.")


def window_starts(length: int, trunc_len: int, stride: int) -> range:
    """Where the windows of `length` ids start; empty where no id has `trunc_len` others before it."""
    check_windows(trunc_len, stride)
    return range(0, max(0, length - trunc_len), stride)


def window_groups(length: int, trunc_len: int, stride: int) -> list[tuple[range, int, int]]:
    """Windows by their length: (starts, ids of a window, targets at its end), at most two groups."""
    starts = window_starts(length, trunc_len, stride)
    if not starts:
        return []
    last = length - starts[-1]  # ids of the last window, if nothing cuts it off
    if last >= trunc_len + stride:
        return [(starts, trunc_len + stride, stride)]
    groups = [(starts[:-1], trunc_len + stride, stride), (starts[-1:], last, last - trunc_len)]
    return groups if len(starts) > 1 else groups[1:]


def cut(x_bt: Tensor, starts: range, width: int) -> Tensor:
    """Windows of `width` entries, [b, n, w]; a view."""
    stride = starts.step
    return x_bt[:, starts[0] : starts[-1] + width].unfold(1, width, stride)


def windowed(
    x_bt: Tensor, trunc_len: int, stride: int, losses: ShortLosses, *, length: int, at_once: int = 1
) -> Tensor:
    """Short losses of a tensor whose windows `losses` can read: [b, length - trunc_len].

    Args:
        x_bt: ids [b, length], or inputs without the last id [b, length - 1].
        trunc_len, stride: K and S.
        losses: see `ShortLosses`; its windows have as many entries less than a window of ids as `x_bt` has less than `length`.
        length: ids of a row, the last target included.
        at_once: entries in one call, as far as one window allows.
    """
    missing = length - x_bt.shape[1]
    pieces = []
    for starts, width, targets in window_groups(length, trunc_len, stride):
        windows = cut(x_bt, starts, width - missing).flatten(0, 1)
        calls = windows.split(max(1, at_once // width))
        found = torch.cat([losses(call, targets) for call in calls])
        pieces.append(found.view(x_bt.shape[0], len(starts) * targets))
    return torch.cat(pieces, dim=1) if pieces else x_bt.new_zeros((x_bt.shape[0], 0), dtype=torch.float32)


def window_cost(length: int, trunc_len: int, stride: int, trunk: Callable[[int], float], head: float) -> float:
    """Forward FLOPs of all windows of a row.

    Args:
        length, trunc_len, stride: ids of the row, K and S.
        trunk: FLOPs per token of everything before the head, at a length.
        head: FLOPs of the head, per target.
    """
    return sum(
        len(starts) * ((width - 1) * trunk(width - 1) + targets * head)
        for starts, width, targets in window_groups(length, trunc_len, stride)
    )


def local_positions(positions: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """Positions inside windows [n, w], restarting where the window or a document starts; None where none were given."""
    if positions is None:
        return None
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    if documents is None:
        return positions - positions[:, :1]
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(begins, index, 0).cummax(1).values
    return positions - positions.gather(1, first)
