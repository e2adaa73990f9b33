"""What all synthetic tasks share: rows from keys, so that any row can be made alone and is always the same.

A task says how tokens and targets come from one key per row. Training rows are keyed by (seed, step, row);
held-out rows by their number alone, in a stream of its own that no training seed reaches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.keyed import Keys, key
from torchstone.data.source import DocumentSpan, row_range
from torchstone.recipe.part import Part
from torchstone.storage.hashing import fingerprint_of

S = TypeVar("S", bound=Part)
Rows = tuple[NDArray[np.int64], NDArray[np.int64]]


class Task(ABC, Generic[S]):
    """A DataSource whose sequences are generated.

    Args:
        settings: the task's part; its plain data and `version` make the fingerprint.
    """

    version = 1  # raised when the same settings give other tokens
    tokenizer = None
    bytes_per_token = None

    def __init__(self, settings: S) -> None:
        self.settings = settings
        self.fingerprint = fingerprint_of({"task": settings.model_dump(mode="json"), "version": self.version})
        self.name = settings.kind

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.settings.vocabulary()  # type: ignore[attr-defined]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.settings.sequence_length()  # type: ignore[attr-defined]

    @abstractmethod
    def rows(self, keys_b: Keys) -> Rows:
        """Tokens and targets, int64 [b, t] each, of one training sequence per key."""

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start … stop-1 of the global batch; row r depends on (seed, step, r) alone."""
        rows = row_range(size, start, stop)
        keys_b = key("train", seed, step, np.arange(rows.start, rows.stop))
        return as_batch(self.rows(keys_b), tuple(step * size + row for row in rows))

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """Held-out items 0 … sequences-1 in batches of `size`."""
        for start in range(0, sequences, size):
            numbers = range(start, min(start + size, sequences))
            yield as_batch(self.held_out(key("evaluation", np.asarray(numbers))), tuple(numbers))

    def held_out(self, keys_b: Keys) -> Rows:
        """Tokens and targets of held-out sequences; as in training unless a task says otherwise."""
        return self.rows(keys_b)

    def documents(self, seed: int, step: int, size: int) -> list[list[DocumentSpan]]:
        """One generated document per row."""
        names = (f"{self.name}/seed {seed}/step {step}/row {row}" for row in range(size))
        return [[DocumentSpan(name, "generated", 0, self.length)] for name in names]


def as_batch(rows: Rows, numbers: tuple[int, ...]) -> Batch:
    """A batch from numpy arrays."""
    tokens_bt, targets_bt = (torch.from_numpy(np.ascontiguousarray(array)) for array in rows)
    return Batch(tokens_bt, targets_bt, rows=numbers)


def score(answers: Tensor, batch: Batch) -> float:
    """Share of scored positions (targets that are not IGNORE) that are answered right.

    Args:
        answers: logits [b, t, v], or predicted tokens [b, t] of an integer type.

    Returns:
        accuracy in 0 … 1; nan if the batch has nothing to score.
    """
    predicted_bt = answers.argmax(-1) if answers.dim() == 3 else answers
    targets_bt = batch.targets_bt.to(predicted_bt.device)
    valid_bt = targets_bt != IGNORE
    return (predicted_bt == targets_bt)[valid_bt].double().mean().item()
