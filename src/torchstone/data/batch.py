"""Batch: the token arrays of some sequences.

Shapes: b sequences · t tokens of a sequence.

Pitfall: `targets_bt[:, t]` is what the model should say at position t, already shifted; an objective must not
shift again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # target of a position that is not scored; the default `ignore_index` of torch's cross entropy


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with their targets.

    Attributes:
        tokens_bt: int64 input tokens.
        targets_bt: int64, the right answer at each position, or IGNORE.
        positions_bt: int64 positions that restart with each document; None counts 0…t-1.
        documents_bt: int64 id >= 0 of the document of each token, unique inside a row; None: one document.
        rows: number of each sequence in its stream (training: step * size + row; evaluation: 0, 1, …), for
            audits of which process saw what.
    """

    tokens_bt: Tensor
    targets_bt: Tensor
    positions_bt: Tensor | None = None
    documents_bt: Tensor | None = None
    rows: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of input tokens."""
        return self.tokens_bt.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; does not wait for the copy where the memory is pinned."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.tokens_bt.to(device, non_blocking=True),
            self.targets_bt.to(device, non_blocking=True),
            move(self.positions_bt),
            move(self.documents_bt),
            self.rows,
        )

    def split(self, micro: int | None) -> list[Batch]:
        """Consecutive pieces of at most `micro` sequences, the last one perhaps smaller; None: one piece."""
        size = self.tokens_bt.shape[0]
        if micro is None or micro >= size:
            return [self]
        return [self._piece(slice(start, start + micro)) for start in range(0, size, micro)]

    def _piece(self, part: slice) -> Batch:
        return Batch(
            self.tokens_bt[part],
            self.targets_bt[part],
            None if self.positions_bt is None else self.positions_bt[part],
            None if self.documents_bt is None else self.documents_bt[part],
            self.rows[part],
        )
