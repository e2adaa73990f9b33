"""Mixture: rows of several data sources in fixed shares, each with token ids of its own.

    data:
      kind: mixture
      sources: [{kind: text, tokenizer: bytes, length: 128}, {kind: gap-recall, cells: 64}]
      shares: [0.5, 0.5]

Every batch holds the same number of rows of each source, as near to the shares as whole rows allow, the first source's rows
first. A source sees its own consecutive rows, so that its epochs and its order are those it has alone with a batch of that
size. Token ids of later sources follow those of earlier ones: no two sources share a token.

`part(i)` is one source with its ids in the mixture, for measurements on each half by itself.

Shapes: b sequences · t tokens.

Pitfalls
  weight        the loss is a mean over target tokens, not over rows: a source that scores few positions of its rows weighs
                less than its share says.
  shared keys   a generated row is a function of (seed, step, row), so that two tasks of one kind draw the same numbers, and
                most of their tokens are equal, whatever their settings. Such mixtures are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.source import DataSource, DocumentSpan, row_range
from torchstone.data.synthetic.task import Task
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.storage.hashing import fingerprint_of


class MixtureConfig(Part):
    """Rows of several sources in fixed shares."""

    family: ClassVar[str] = "data"
    kind: Literal["mixture"] = "mixture"
    sources: list[part_field("data")] = Field(  # type: ignore[valid-type]
        default=[{"kind": "text", "tokenizer": "bytes"}, {"kind": "gap-recall"}],
        validate_default=True,
        min_length=1,
        description="data sources whose sequences are equally long",
    )
    shares: list[float] = Field(
        default=[0.5, 0.5], description="share of each source in the rows of a batch; they add up to 1"
    )

    @model_validator(mode="after")
    def _agree(self) -> MixtureConfig:
        if len(self.shares) != len(self.sources) or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(
                f"{len(self.sources)} sources have the shares {self.shares}; give one positive share for each, adding up to 1"
            )
        lengths = [source.sequence_length() for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(f"the sources' sequences have {lengths} tokens; a batch needs equally long ones")
        return self

    def vocabulary(self) -> int:
        """Number of token ids of all sources."""
        return sum(source.vocabulary() for source in self.sources)

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.sources[0].sequence_length()

    def build(self, cache: Path | None = None) -> Mixture:
        """Build every source; raises what they raise."""
        return Mixture([source.build(cache) for source in self.sources], self.shares)


class Shifted:
    """A source whose token ids start at `first` instead of 0; see `Mixture.part`.

    Attributes:
        inner: the source with its own ids, for what only it offers (where answers are).
        first: what is added to its ids.
    """

    def __init__(self, inner: DataSource, first: int) -> None:
        self.inner, self.first = inner, first

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """The inner source's training rows."""
        return self._moved(self.inner.batch(seed, step, size, start, stop))

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """The inner source's held-out items."""
        for batch in self.inner.evaluation(size, sequences):
            yield self._moved(batch)

    def own_ids(self, tokens_bt: Tensor) -> Tensor:
        """Tokens of the mixture as the inner source counts them."""
        return tokens_bt - self.first

    def _moved(self, batch: Batch) -> Batch:
        targets_bt = torch.where(batch.targets_bt == IGNORE, IGNORE, batch.targets_bt + self.first)
        return Batch(batch.tokens_bt + self.first, targets_bt, batch.positions_bt, batch.documents_bt, batch.rows)


class Mixture:
    """DataSource of a mixture.

    Args:
        sources: equally long sources, no two of them tasks of one kind.
        shares: of the rows, one per source.

    Raises:
        ConfigError: no share for a source, or two tasks of one kind.
    """

    tokenizer = None  # ids of several vocabularies are no text
    bytes_per_token = None

    def __init__(self, sources: Sequence[DataSource], shares: Sequence[float]) -> None:
        if not sources or len(sources) != len(shares):
            raise ConfigError(f"a mixture of {len(sources)} sources was given {len(shares)} shares; give one for each.")
        _check_kinds([name for source in sources for name in _tasks(source)])
        self.shares = tuple(shares)
        self.length = sources[0].length
        firsts = [sum(source.vocab_size for source in sources[:i]) for i in range(len(sources))]
        self.parts = tuple(Shifted(source, first) for source, first in zip(sources, firsts, strict=True))
        self.vocab_size = sum(source.vocab_size for source in sources)
        self.fingerprint = fingerprint_of(["mixture", list(shares), [source.fingerprint for source in sources]])

    def part(self, index: int) -> Shifted:
        """One source with its token ids in the mixture."""
        return self.parts[index]

    def counts(self, sequences: int) -> list[int]:
        """Rows of each source among `sequences`; raises DataError if a source has none."""
        ends = [round(sum(self.shares[: i + 1]) * sequences) for i in range(len(self.shares))]
        found = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        if 0 in found:
            raise DataError(
                f"{sequences} sequences in shares {self.shares} leave source {found.index(0)} of the mixture without a row; "
                "give more sequences (batch.sequences, evaluation.sequences), or larger shares."
            )
        return found

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start … stop-1 of the global batch of `size` sequences at `step`."""
        rows = row_range(size, start, stop)
        pieces, begin = [], 0
        for part, count in zip(self.parts, self.counts(size), strict=True):
            first, last = max(rows.start - begin, 0), min(rows.stop - begin, count)
            if first < last:
                pieces.append(part.batch(seed, step, count, first, last))
            begin += count
        return _joined(pieces, tuple(step * size + row for row in rows))

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """Held-out items of every source in its share, one source after the other."""
        begin = 0
        for part, count in zip(self.parts, self.counts(sequences), strict=True):
            for batch in part.evaluation(size, count):
                yield _joined([batch], tuple(range(begin, begin + len(batch.tokens_bt))))
                begin += len(batch.tokens_bt)

    def documents(self, seed: int, step: int, size: int) -> list[list[DocumentSpan]]:
        """Which documents are in each row of a training batch."""
        counts = self.counts(size)
        spans = [part.inner.documents(seed, step, count) for part, count in zip(self.parts, counts, strict=True)]
        return [row for rows in spans for row in rows]


def _tasks(source: DataSource) -> list[str]:
    """Kinds of the generated tasks in a source, which may be a mixture itself."""
    if isinstance(source, Mixture):
        return [name for part in source.parts for name in _tasks(part.inner)]
    return [source.name] if isinstance(source, Task) else []


def _check_kinds(names: Sequence[str]) -> None:
    """Raise ConfigError if a kind of task is there twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"a mixture was given two sources of the task {twice[0]}; rows of one task come from the same random numbers, "
            "whatever its settings, so that most tokens of the two would be equal: give one source of each task with the "
            "sum of their shares, or tasks of different kinds."
        )


def _joined(batches: Sequence[Batch], rows: tuple[int, ...]) -> Batch:
    """One batch of several; rows without documents are one document each where others have some."""
    masked = any(batch.documents_bt is not None for batch in batches)
    return Batch(
        torch.cat([batch.tokens_bt for batch in batches]),
        torch.cat([batch.targets_bt for batch in batches]),
        torch.cat([_positions(batch) for batch in batches]) if masked else None,
        torch.cat([_documents(batch) for batch in batches]) if masked else None,
        rows,
    )


def _positions(batch: Batch) -> Tensor:
    if batch.positions_bt is not None:
        return batch.positions_bt
    return torch.arange(batch.tokens_bt.shape[1]).expand_as(batch.tokens_bt)


def _documents(batch: Batch) -> Tensor:
    return batch.documents_bt if batch.documents_bt is not None else torch.zeros_like(batch.tokens_bt)
