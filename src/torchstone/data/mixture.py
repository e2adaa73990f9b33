"""Mixture: rows of several data sources in fixed shares, or in shares that change with the stages of the schedule.

    data:
      kind: mixture
      sources: [{kind: text, tokenizer: bytes, length: 128}, {kind: gap-recall, cells: 64}]
      shares: [0.5, 0.5]
      token_ids: separate

Every batch holds the same number of rows of each source, as near to the shares as whole rows allow, the first source's rows
first. A source sees its own consecutive rows, so that its epochs and its order are those it has alone with a batch of that
size.

token_ids
  separate   ids of later sources follow those of earlier ones: no two sources share a token.
  shared     one vocabulary for all, for texts in the same tokenizer. The mixture then has this tokenizer, and its bytes per
             token are those of its held-out rows.

phases       `in_phases` gives other shares to some steps (`data_phases` of a recipe). Each source goes on with its own next
             rows: no row is left out or comes twice at a border. Held-out rows keep the mixture's own shares in every
             phase, so that losses before and after a border are of the same text.

`part(i)` is one source with its ids in the mixture, for measurements on each source by itself.

Shapes: b sequences · t tokens.

Pitfalls
  weight        the loss is a mean over target tokens, not over rows: a source that scores few positions of its rows weighs
                less than its share says.
  shared keys   a generated row is a function of (seed, step, row), so that two tasks of one kind draw the same numbers, and
                most of their tokens are equal, whatever their settings. Such mixtures are refused.
  blocks        a source is asked for its rows in blocks of its most rows per batch in any phase, so that a task draws other
                rows where this number differs. A source that is a mixture itself is asked in blocks of the greatest common
                divisor of its rows per batch, and needs a row of each of its own sources in every block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.shares import Phase, Timetable, check_shares, row_counts
from torchstone.data.source import DataSource, DocumentSpan, row_range
from torchstone.data.synthetic.task import Task
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import ConfigError
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.storage.hashing import fingerprint_of

TokenIds = Literal["separate", "shared"]


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
    token_ids: TokenIds = Field(
        default="separate", description="ids of each source's own, or shared by texts in the same tokenizer"
    )

    @model_validator(mode="after")
    def _agree(self) -> MixtureConfig:
        check_shares(self.shares, len(self.sources), "shares", absent=False)
        lengths = [source.sequence_length() for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(f"the sources' sequences have {lengths} tokens; a batch needs equally long ones")
        return self

    def vocabulary(self) -> int:
        """Number of token ids of all sources."""
        counts = [source.vocabulary() for source in self.sources]
        return max(counts) if self.token_ids == "shared" else sum(counts)

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.sources[0].sequence_length()

    def check_phase(self, stage: str, shares: Sequence[float]) -> None:
        """Raise ConfigError unless the shares of a stage fit the sources and add up to 1; a source may be absent."""
        check_shares(shares, len(self.sources), f"stage {stage}", absent=True)

    def build(self, cache: Path | None = None) -> Mixture:
        """Build every source; raises what they raise."""
        return Mixture([source.build(cache) for source in self.sources], self.shares, self.token_ids)


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
        return replace(batch, tokens_bt=batch.tokens_bt + self.first, targets_bt=targets_bt)


class Mixture:
    """DataSource of a mixture.

    Args:
        sources: equally long sources, no two of them tasks of one kind.
        shares: of the rows, one per source.
        token_ids: `separate` or `shared`.
        phases: shares of the training rows from some steps on; none: `shares` at every step.

    Raises:
        ConfigError: no share for a source, two tasks of one kind, or shared ids without a shared tokenizer.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        shares: Sequence[float],
        token_ids: TokenIds = "separate",
        phases: Sequence[Phase] = (),
    ) -> None:
        if not sources or len(sources) != len(shares):
            raise ConfigError(f"a mixture of {len(sources)} sources was given {len(shares)} shares; give one for each.")
        _check_kinds([name for source in sources for name in _tasks(source)])
        self.tokenizer = _one_tokenizer(sources) if token_ids == "shared" else None
        self.token_ids, self.shares, self.length = token_ids, tuple(shares), sources[0].length
        self.phases = tuple(phases) or (Phase("", 0, self.shares),)
        self._timetables: dict[int, Timetable] = {}
        sizes = [0 if token_ids == "shared" else source.vocab_size for source in sources]
        self.parts = tuple(Shifted(source, sum(sizes[:i])) for i, source in enumerate(sources))
        self.vocab_size = sources[0].vocab_size if token_ids == "shared" else sum(sizes)

    @property
    def fingerprint(self) -> str:
        """Hash of the sources, their shares and those of the phases, but not of the steps at which phases begin.

        A larger budget that only moves a border which is still to come may so continue a run on the same data.
        """
        content: list[Any] = ["mixture", list(self.shares), [part.inner.fingerprint for part in self.parts]]
        changed = sorted({(phase.name, phase.shares) for phase in self.phases if phase.shares != self.shares})
        if self.token_ids != "separate" or changed:
            content += [self.token_ids, changed]
        return fingerprint_of(content)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per held-out token in the mixture's own shares; None unless ids are shared and every source knows."""
        known = [part.inner.bytes_per_token for part in self.parts]
        if self.token_ids != "shared" or None in known:
            return None
        return sum(share * (value or 0.0) for share, value in zip(self.shares, known, strict=True))

    def part(self, index: int) -> Shifted:
        """One source with its token ids in the mixture."""
        return self.parts[index]

    def in_phases(self, phases: Sequence[Phase]) -> Mixture:
        """The same mixture with other shares in some steps of training."""
        return Mixture([part.inner for part in self.parts], self.shares, self.token_ids, phases)

    def counts(self, sequences: int) -> list[int]:
        """Rows of each source among `sequences` in the mixture's own shares; raises DataError if a source has none."""
        return list(row_counts(self.shares, sequences))

    def timetable(self, size: int) -> Timetable:
        """Rows of each source at every step of training with batches of `size`; raises what `Timetable` raises."""
        if size not in self._timetables:
            self._timetables[size] = Timetable(self.phases, size)
        return self._timetables[size]

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start … stop-1 of the global batch of `size` sequences at `step`."""
        rows, table = row_range(size, start, stop), self.timetable(size)
        pieces: list[Batch] = []
        owners: list[int] = []
        begin = 0
        for index, (part, count, number, block) in enumerate(self._places(table, step)):
            first, last = max(rows.start - begin, 0), min(rows.stop - begin, count)
            for piece, low, high in _blocks(number + first, number + last, block):
                pieces.append(part.batch(seed, piece, block, low, high))
            begin += count
            owners += [index] * (len(pieces) - len(owners))
        _check_scored(pieces, owners)
        return _joined(pieces, tuple(step * size + row for row in rows))

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """Held-out items of every source in its share, whatever the phases, one source after the other."""
        begin = 0
        for part, count in zip(self.parts, self.counts(sequences), strict=True):
            for batch in part.evaluation(size, count):
                yield _joined([batch], tuple(range(begin, begin + len(batch.tokens_bt))))
                begin += len(batch.tokens_bt)

    def documents(self, seed: int, step: int, size: int) -> list[list[DocumentSpan]]:
        """Which documents are in each row of a training batch."""
        return [
            row
            for part, count, number, block in self._places(self.timetable(size), step)
            for index, low, high in _blocks(number, number + count, block)
            for row in part.inner.documents(seed, index, block)[low:high]
        ]

    def _places(self, table: Timetable, step: int) -> Iterator[tuple[Shifted, int, int, int]]:
        """Each source with its rows in the batch, the number of the first of them, and the rows of its blocks."""
        inside = [isinstance(part.inner, Mixture) for part in self.parts]
        blocks = [table.divisors[i] if mixed else table.largest[i] for i, mixed in enumerate(inside)]
        return zip(self.parts, table.counts(step), table.before(step), blocks, strict=True)


def _blocks(first: int, last: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Rows first … last-1 of a source as (block, its first row, the row behind its last row)."""
    while first < last:
        index, low = divmod(first, block)
        high = min(block, low + last - first)
        yield index, low, high
        first += high - low


def _one_tokenizer(sources: Sequence[DataSource]) -> Tokenizer:
    """The tokenizer that all sources have; raises ConfigError if there is none."""
    first = sources[0].tokenizer
    for index, source in enumerate(sources):
        found = source.tokenizer
        if found is None:
            raise ConfigError(
                f"shared token ids need texts, and source {index} of the mixture has no tokenizer; use token_ids: separate."
            )
        if first is not None and (found.fingerprint, source.vocab_size) != (first.fingerprint, sources[0].vocab_size):
            raise ConfigError(
                f"shared token ids need one tokenizer, and that of source {index} ({source.vocab_size} ids) is not that of "
                f"source 0 ({sources[0].vocab_size} ids): one that is trained (bpe) differs from text to text. Give all "
                "sources tokenizer: bytes or the same huggingface tokenizer, or use token_ids: separate."
            )
    assert first is not None
    return first


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


def _check_scored(pieces: Sequence[Batch], owners: Sequence[int]) -> None:
    """Raise ConfigError naming a source without stored reference losses where another has some."""
    having = sorted({owner for piece, owner in zip(pieces, owners, strict=True) if piece.reference_bt is not None})
    lacking = sorted(set(owners) - set(having))
    if having and lacking:
        raise ConfigError(
            f"source {lacking[0]} of the mixture brings no stored reference losses, and source {having[0]} does; wrap every "
            "source in {kind: scored, source: …, scores: …}, or none."
        )


def _joined(batches: Sequence[Batch], rows: tuple[int, ...]) -> Batch:
    """One batch of several; rows without documents are one document each, and without noise flags clean, where others have
    some. Reference losses are kept; `_check_scored` makes sure that all have them or none.
    """
    masked = any(batch.documents_bt is not None for batch in batches)
    flagged = any(batch.noise_bt is not None for batch in batches)
    scored = [batch.reference_bt for batch in batches if batch.reference_bt is not None]
    return Batch(
        torch.cat([batch.tokens_bt for batch in batches]),
        torch.cat([batch.targets_bt for batch in batches]),
        torch.cat([_positions(batch) for batch in batches]) if masked else None,
        torch.cat([_documents(batch) for batch in batches]) if masked else None,
        rows,
        reference_bt=torch.cat(scored) if len(scored) == len(batches) else None,
        noise_bt=torch.cat([_noise(batch) for batch in batches]) if flagged else None,
    )


def _positions(batch: Batch) -> Tensor:
    if batch.positions_bt is not None:
        return batch.positions_bt
    return torch.arange(batch.tokens_bt.shape[1]).expand_as(batch.tokens_bt)


def _noise(batch: Batch) -> Tensor:
    return batch.noise_bt if batch.noise_bt is not None else torch.zeros_like(batch.tokens_bt, dtype=torch.bool)


def _documents(batch: Batch) -> Tensor:
    return batch.documents_bt if batch.documents_bt is not None else torch.zeros_like(batch.tokens_bt)
