"""Batch: the token arrays of some sequences.

Shapes: b sequences · t tokens of a sequence.

Pitfall: `targets_bt[:, t]` is what the model should say at position t, already shifted; an objective must not
shift again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

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
        reference_bt: fp32, a reference model's loss on each target, 0 where there is none; see `torchstone.data.scored`.
        noise_bt: bool, where the target is noise that the data's maker put in.
        weights_bt: fp32, the weight of each target, where it is decided before the gradient.
    """

    tokens_bt: Tensor
    targets_bt: Tensor
    positions_bt: Tensor | None = None
    documents_bt: Tensor | None = None
    rows: tuple[int, ...] = ()
    reference_bt: Tensor | None = None
    noise_bt: Tensor | None = None
    weights_bt: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of input tokens."""
        return self.tokens_bt.numel()

    def map(self, change: Callable[[Tensor], Tensor], rows: tuple[int, ...] | None = None) -> Batch:
        """The batch with every tensor changed; `rows`, if given, in place of its own."""
        values = {name: getattr(self, name) for name in TENSORS}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return replace(self, **changed, rows=self.rows if rows is None else rows)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; does not wait for the copy where the memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, micro: int | None) -> list[Batch]:
        """Consecutive pieces of at most `micro` sequences, the last one perhaps smaller; None: one piece."""
        size = self.tokens_bt.shape[0]
        if micro is None or micro >= size:
            return [self]
        return [self._piece(slice(start, start + micro)) for start in range(0, size, micro)]

    def _piece(self, part: slice) -> Batch:
        return self.map(lambda tensor: tensor[part], self.rows[part])


TENSORS = tuple(entry.name for entry in fields(Batch) if entry.name.endswith("_bt"))
