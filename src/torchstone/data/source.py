"""DataSource: what training and evaluation ask of data, whatever it is made from.

A batch is a pure function of (data fingerprint, seed, step): no iterator, no state, nothing to save. A
process of a distributed run asks for its rows of the global batch; the union is the same for every number of
processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torchstone.data.batch import Batch
from torchstone.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class DocumentSpan:
    """A document, or the piece of it, that lies in one row of a batch.

    Attributes:
        id: the document's name in its corpus.
        location: `file:line` where it was read, or `generated`.
        start, stop: its input tokens in the row, `tokens_bt[row, start:stop]`.
    """

    id: str
    location: str
    start: int
    stop: int


@runtime_checkable
class DataSource(Protocol):
    """Training and held-out sequences.

    `vocab_size`: token ids are 0 … vocab_size-1. `length`: tokens of a sequence. `fingerprint`: hexadecimal,
    equal exactly when the data is equal. `tokenizer`: None where tokens are no text. `bytes_per_token`: UTF-8
    bytes per token of the held-out text, to turn nats per token into bits per byte; None where there is no
    text.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def bytes_per_token(self) -> float | None: ...

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start … stop-1 of the global training batch of `size` sequences at `step`."""
        ...

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """The first `sequences` held-out items in batches of `size`; the same items in every call."""
        ...

    def documents(self, seed: int, step: int, size: int) -> list[list[DocumentSpan]]:
        """Which documents are in each row of a training batch."""
        ...


def row_range(size: int, start: int, stop: int | None) -> range:
    """Rows of a global batch that are asked for; a wrong range is a programmer's mistake."""
    last = size if stop is None else stop
    assert 0 <= start < last <= size, f"rows {start}:{last} are not in a batch of {size} sequences"
    return range(start, last)
