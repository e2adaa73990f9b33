"""Text rearranged so that a causal model learns to write towards a goal: its end first, then the rest (fill in the middle).

Bavarian et al. (arXiv 2207.14255) trained code models so; Hu et al. (arXiv 2410.23506) use this form as their baseline:

    goal-first    suffix  <fim>  prefix … middle  END        END says: here the suffix begins
    as-written    prefix … middle  suffix  END               the same pieces for models that need no rearranging

Every document is cut into pieces of at most `piece` tokens, each a document of its own here; the length of its suffix is drawn
evenly from goal_min … goal_max anew in every epoch (shorter in pieces that would not keep a token before it). Pieces are
joined and cut into rows of `text.length` tokens. Attention stays inside a piece, positions restart with it, and its first token
is not scored. <fim> is one more id behind the text's own.

Shapes: b rows · t tokens · p pieces.

Pitfall: `goal-first` scores what the objective `fill-in-the-middle` leaves of it; under `next-token` the suffix is learned too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.keyed import Keys, key, uniform
from torchstone.data.order import item_at
from torchstone.data.shards import Shard
from torchstone.data.source import DocumentSpan, row_range
from torchstone.errors import DataError
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.storage.hashing import fingerprint_of

Order = Literal["goal-first", "as-written"]


class FillInTheMiddleConfig(Part):
    """Pieces of text with their end first."""

    family: ClassVar[str] = "data"
    kind: Literal["fill-in-the-middle"] = "fill-in-the-middle"
    text: part_field("data") = Field(  # type: ignore[valid-type]
        default={"kind": "text"}, validate_default=True, description="the text; its `length` is that of a row"
    )
    piece: int = Field(default=256, gt=1, description="most tokens of a piece of a document")
    goal_min: int = Field(default=25, ge=0, description="least tokens of a suffix")
    goal_max: int = Field(default=75, gt=0, description="most tokens of a suffix")
    order: Order = Field(default="goal-first", description="goal-first: suffix, <fim>, the rest; as-written: unchanged")

    @model_validator(mode="after")
    def _fits(self) -> FillInTheMiddleConfig:
        if self.text.kind != "text":
            raise ValueError(f"text is of the kind {self.text.kind}, and only the kind text has documents; give that")
        if not self.goal_min <= self.goal_max < self.piece:
            raise ValueError(
                f"suffixes of {self.goal_min} to {self.goal_max} tokens do not fit pieces of {self.piece}; keep goal_min <= "
                "goal_max < piece"
            )
        return self

    def vocabulary(self) -> int:
        """Number of token ids: those of the text, and <fim>."""
        return self.text.vocabulary() + 1

    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.text.sequence_length()

    def build(self, cache: Path | None = None) -> FillInTheMiddleSource:
        """Read (or tokenise and keep) the text; raises what `TextConfig.build` raises."""
        return FillInTheMiddleSource(self, self.text.build(cache))


class FillInTheMiddleSource:
    """DataSource of rearranged text.

    Args:
        settings: of the part.
        text: the text as it is.
    """

    bytes_per_token = None  # a loss over middles is no loss over the text

    def __init__(self, settings: FillInTheMiddleConfig, text: Any) -> None:
        self.settings, self.text, self.tokenizer = settings, text, text.tokenizer
        self.vocab_size, self.length = text.vocab_size + 1, text.length
        self.fim_token, self.end_token = text.vocab_size, text.tokenizer.end_of_document
        cut = settings.model_dump(mode="json", exclude={"text"})
        self.fingerprint = fingerprint_of([text.shards.fingerprint, text.length, cut])
        self.train, self.held_out = (
            Pieces(shard, settings.piece, self._extra) for shard in (text.shards.train, text.shards.validation)
        )
        for pieces in (self.train, self.held_out):
            if pieces.windows(self.length) == 0:
                raise DataError(
                    f"the {pieces.shard.name} split has {pieces.total} tokens, too few for one row of {self.length} and its "
                    "target; give more text, a shorter text.length, or another text.validation_fraction."
                )

    @property
    def _extra(self) -> int:
        """Tokens that a piece has beside its text."""
        return 2 if self.settings.order == "goal-first" else 1

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start … stop-1 of the global batch of `size` rows at `step`."""
        rows = row_range(size, start, stop)
        numbers = step * size + np.arange(rows.start, rows.stop)
        windows = self.train.windows(self.length)
        items, epochs = item_at(numbers, windows, seed), numbers // windows
        keys = [key("goal", seed, int(epoch)) for epoch in epochs]
        return self._batch(self.train, items, keys, numbers)

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """`sequences` held-out rows, evenly spread, in batches of `size`; raises DataError if there are fewer."""
        windows = self.held_out.windows(self.length)
        if sequences > windows:
            raise DataError(
                f"the held-out text has {windows} rows of {self.length} tokens, but {sequences} are asked for; set "
                f"evaluation.sequences to at most {windows}, shorten text.length, or raise text.validation_fraction."
            )
        chosen, fixed = np.arange(sequences) * windows // sequences, key("goal of held-out text")
        for start in range(0, sequences, size):
            numbers = np.arange(start, min(start + size, sequences))
            yield self._batch(self.held_out, chosen[numbers], [fixed] * len(numbers), numbers)

    def documents(self, seed: int, step: int, size: int) -> list[list[DocumentSpan]]:
        """Which pieces of which documents are in each row of a training batch."""
        labels, pieces = self.train.shard.labels(), self.train
        items = item_at(step * size + np.arange(size), pieces.windows(self.length), seed)
        return [
            [
                DocumentSpan(*labels[int(pieces.document_p[piece])], start=start, stop=stop)
                for piece, start, stop in pieces.inside(int(item) * self.length, self.length)
            ]
            for item in items
        ]

    def goal_lengths(self, pieces_p: NDArray[np.int64], sizes_p: NDArray[np.int64], stream: Keys) -> NDArray[np.int64]:
        """Tokens of the suffix of each piece: drawn evenly, less where no token would be left before it."""
        task = self.settings
        drawn_p = uniform(key("piece", stream, pieces_p.astype(np.uint64)), 1)[:, 0]
        wanted_p = task.goal_min + (drawn_p * (task.goal_max - task.goal_min + 1)).astype(np.int64)
        return np.minimum(wanted_p, np.maximum(sizes_p - 1, 0))

    def _batch(self, pieces: Pieces, items: NDArray[np.int64], keys: list[Keys], numbers: NDArray[np.int64]) -> Batch:
        window_bt = np.stack(
            [self._window(pieces, int(item) * self.length, stream) for item, stream in zip(items, keys, strict=True)]
        )
        tokens_bt = torch.from_numpy(window_bt[:, :-1].copy())
        ends_bt = tokens_bt == self.end_token
        targets_bt = torch.from_numpy(window_bt[:, 1:].copy()).masked_fill(ends_bt, IGNORE)
        starts_bt = torch.zeros_like(ends_bt)
        starts_bt[:, 1:] = ends_bt[:, :-1]
        index_t = torch.arange(self.length)
        positions_bt = index_t - torch.where(starts_bt, index_t, 0).cummax(1).values
        return Batch(tokens_bt, targets_bt, positions_bt, starts_bt.cumsum(1), tuple(map(int, numbers)))

    def _window(self, pieces: Pieces, begin: int, stream: Keys) -> NDArray[np.int64]:
        """Tokens begin … begin + length of the stream of pieces."""
        inside = pieces.inside(begin, self.length + 1)
        numbers_p = np.asarray([piece for piece, _, _ in inside])
        goals_p = self.goal_lengths(numbers_p, pieces.size_p[numbers_p], stream)
        joined = np.concatenate(
            [self._arranged(pieces.text(piece), int(goal)) for piece, goal in zip(numbers_p, goals_p, strict=True)]
        )
        skipped = begin - int(pieces.begin_p[numbers_p[0]])
        return joined[skipped : skipped + self.length + 1]

    def _arranged(self, text_t: NDArray[np.int64], goal: int) -> NDArray[np.int64]:
        """One piece with its special tokens."""
        if self.settings.order == "as-written":
            return np.append(text_t, self.end_token)
        cut = len(text_t) - goal
        return np.concatenate([text_t[cut:], [self.fim_token], text_t[:cut], [self.end_token]])


class Pieces:
    """One side of the split as pieces of documents, and where each lies in the joined stream.

    Args:
        shard: the tokenised text.
        longest: most tokens of a piece.
        extra: tokens that the stream adds to each piece.

    Attributes:
        document_p, first_p, size_p: document of each piece, its first token in the shard, its tokens.
        begin_p: its first token in the stream. total: tokens of the stream.
    """

    def __init__(self, shard: Shard, longest: int, extra: int) -> None:
        self.shard = shard
        firsts = np.concatenate([[0], shard.ends[:-1]]).astype(np.int64)
        sizes = np.asarray(shard.ends) - firsts - 1  # without the end token
        counts = -(-sizes // longest)
        self.document_p = np.repeat(np.arange(len(sizes)), counts)
        place_p = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        self.first_p = firsts[self.document_p] + place_p * longest
        self.size_p = np.minimum(longest, sizes[self.document_p] - place_p * longest)
        stops_p = (self.size_p + extra).cumsum()
        self.begin_p = stops_p - self.size_p - extra
        self.total = int(stops_p[-1]) if len(stops_p) else 0

    def windows(self, length: int) -> int:
        """Rows of `length` tokens whose last target still exists."""
        return max(0, self.total - 1) // length

    def text(self, piece: int) -> NDArray[np.int64]:
        """Tokens of a piece."""
        first = int(self.first_p[piece])
        return self.shard.read(first, first + int(self.size_p[piece]))

    def inside(self, begin: int, length: int) -> list[tuple[int, int, int]]:
        """Pieces that lie in `length` tokens of the stream, with their first token there and the one after their last."""
        first = int(np.searchsorted(self.begin_p, begin, side="right")) - 1
        last = int(np.searchsorted(self.begin_p, begin + length, side="left"))
        edges = [*self.begin_p[first:last], self.total if last == len(self.begin_p) else self.begin_p[last]]
        return [
            (first + number, max(0, int(edges[number]) - begin), min(length, int(edges[number + 1]) - begin))
            for number in range(last - first)
        ]
