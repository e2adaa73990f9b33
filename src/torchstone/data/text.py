"""Text as training data: documents of a corpus, tokenised, joined, cut into windows of equal length.

    d1 d1 d1 END d2 d2 END d3 d3 d3 d3 END …      one stream of all training documents in corpus order
    [  window 0 ][  window 1 ][  window 2 ]       `length` inputs each; the targets are one token further

Windows are drawn in a new shuffle each epoch. With `mask_documents` attention stays inside a document,
positions restart at each document, and the first token of a document (which nothing predicts) is not scored.

A corpus that injects noise (`corpus: noisy`) gives `noise_bt` with every training batch; held-out text is clean.

Shapes: b sequences · t tokens.

Pitfall: without `mask_documents` a window may see the end of an unrelated document before its own; that is
the usual way of pretraining, cheap and mostly harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.cache import cache_folder
from torchstone.data.order import item_at
from torchstone.data.shards import Shard, Shards, open_or_build
from torchstone.data.source import DocumentSpan, row_range
from torchstone.data.split import split
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import DataError
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.storage.hashing import fingerprint_of


class TextConfig(Part):
    """Windows of a tokenised corpus."""

    family: ClassVar[str] = "data"
    kind: Literal["text"] = "text"
    corpus: part_field("corpus") = {"kind": "stdlib"}  # type: ignore[valid-type]
    tokenizer: part_field("tokenizer") = {"kind": "bpe"}  # type: ignore[valid-type]
    length: int = Field(default=128, gt=0, description="tokens of a sequence")
    mask_documents: bool = Field(default=False, description="attention and positions stay inside a document")
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="share of the documents held out")

    def vocabulary(self) -> int:
        """Number of token ids, without building the data."""
        return self.tokenizer.vocabulary()

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def build(self, cache: Path | None = None) -> TextSource:
        """Read (or tokenise and keep) the corpus.

        Args:
            cache: folder of built data; None: $TORCHSTONE_CACHE, else ~/.cache/torchstone.

        Raises:
            DataError: the corpus cannot be read or is too short for one window.
            DependencyError: a file format needs a package that is not installed.
        """
        folder = cache_folder(cache)
        corpus = self.corpus.build()
        fraction = self.validation_fraction
        tokenizer = self.tokenizer.build(
            lambda: (document for document, held in split(corpus.documents(), fraction) if not held),
            fingerprint_of([corpus.fingerprint, fraction]),
            folder,
        )
        shards = open_or_build(corpus, tokenizer, fraction, folder)
        return TextSource(shards, tokenizer, self.length, self.mask_documents)


class TextSource:
    """DataSource of text.

    Args:
        shards: the tokenised corpus.
        tokenizer: the one that made it.
        length: tokens of a sequence.
        mask_documents: give document ids and restarting positions with each batch.
    """

    def __init__(self, shards: Shards, tokenizer: Tokenizer, length: int, mask_documents: bool = False) -> None:
        self.shards = shards
        self.tokenizer = tokenizer
        self.length = length
        self.mask_documents = mask_documents
        self.vocab_size = tokenizer.vocab_size
        self.fingerprint = fingerprint_of([shards.fingerprint, length, mask_documents])
        self.windows = _windows(shards.train, length)
        self.held_out = _windows(shards.validation, length)
        for shard, count in ((shards.train, self.windows), (shards.validation, self.held_out)):
            if count == 0:
                raise DataError(
                    f"the {shard.name} split has {len(shard.tokens)} tokens, too few for one sequence of "
                    f"{length} and its target; give more text, a shorter data.length, or another "
                    "data.validation_fraction."
                )

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the held-out text per token, ends of documents counted as tokens."""
        return self.shards.validation.text_bytes / len(self.shards.validation.tokens)

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start … stop-1 of the global batch of `size` windows at `step`."""
        rows = row_range(size, start, stop)
        numbers = step * size + np.arange(rows.start, rows.stop)
        return self._batch(self.shards.train, self.items(seed, step, size, start, stop), numbers)

    def items(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """Which training window is in each of these rows of a batch; equal numbers are equal windows, whatever the seed."""
        rows = row_range(size, start, stop)
        return item_at(step * size + np.arange(rows.start, rows.stop), self.windows, seed)

    def window(self, items: NDArray[np.int64]) -> Batch:
        """Training windows by number, 0 … windows-1, in the order of the text."""
        return self._batch(self.shards.train, items, items)

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """`sequences` held-out windows, evenly spread over the held-out text, in batches of `size`.

        Raises:
            DataError: the held-out text has fewer windows.
        """
        if sequences > self.held_out:
            raise DataError(
                f"the held-out text has {self.held_out} sequences of {self.length} tokens, but "
                f"{sequences} are asked for; set evaluation.sequences to at most {self.held_out}, shorten "
                "data.length, or raise data.validation_fraction."
            )
        chosen = np.arange(sequences) * self.held_out // sequences
        for start in range(0, sequences, size):
            numbers = np.arange(start, min(start + size, sequences))
            yield self._batch(self.shards.validation, chosen[numbers], numbers)

    def documents(self, seed: int, step: int, size: int) -> list[list[DocumentSpan]]:
        """Which documents, from which file and line, are in each row of a training batch."""
        items = self.items(seed, step, size)
        return [self._spans(int(item) * self.length) for item in items]

    @cached_property
    def _labels(self) -> list[tuple[str, str]]:
        return self.shards.train.labels()

    def _spans(self, begin: int) -> list[DocumentSpan]:
        ends = self.shards.train.ends
        spans, position = [], begin
        while position < begin + self.length:
            document = self.shards.train.first_document(position)
            stop = min(int(ends[document]), begin + self.length)
            spans.append(DocumentSpan(*self._labels[document], position - begin, stop - begin))
            position = stop
        return spans

    def _batch(self, shard: Shard, items: NDArray[np.int64], numbers: NDArray[np.int64]) -> Batch:
        begins = [int(item) * self.length for item in items]
        window_bt = np.stack([shard.read(begin, begin + self.length + 1) for begin in begins])
        tokens_bt, targets_bt = window_bt[:, :-1], window_bt[:, 1:]
        rows = tuple(int(number) for number in numbers)
        noise_bt = _noise(shard, begins, self.length)
        if not self.mask_documents:
            return Batch(_tensor(tokens_bt), _tensor(targets_bt), rows=rows, noise_bt=noise_bt)
        ends_bt = tokens_bt == self.tokenizer.end_of_document
        targets_bt = np.where(ends_bt, IGNORE, targets_bt)
        documents_bt, positions_bt = _inside_documents(ends_bt)
        positions, documents = _tensor(positions_bt), _tensor(documents_bt)
        return Batch(_tensor(tokens_bt), _tensor(targets_bt), positions, documents, rows, noise_bt=noise_bt)


def _windows(shard: Shard, length: int) -> int:
    """Windows of `length` inputs whose last target still exists."""
    return max(0, len(shard.tokens) - 1) // length


def _noise(shard: Shard, begins: Sequence[int], length: int) -> torch.Tensor | None:
    """Which targets of windows are noise; None where the corpus has no flags."""
    if shard.noise is None:
        return None
    rows = [shard.noise[begin + 1 : begin + length + 1] for begin in begins]
    return torch.from_numpy(np.stack(rows).astype(np.bool_))


def _inside_documents(ends_bt: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of each token's document in its row, and the token's position since the document began."""
    starts_bt = np.zeros_like(ends_bt)
    starts_bt[:, 1:] = ends_bt[:, :-1]
    steps_bt = np.broadcast_to(np.arange(ends_bt.shape[1]), ends_bt.shape)
    first_bt = np.maximum.accumulate(np.where(starts_bt, steps_bt, 0), axis=1)
    return starts_bt.cumsum(axis=1), steps_bt - first_bt


def _tensor(array: NDArray[np.int64]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
