"""Scored data: a source whose training batches carry a reference model's loss on every target.

    data: {kind: scored, source: {kind: text, corpus: …}, scores: scores/reference}

`torchstone score data RECIPE --reference MODEL --store scores/reference` writes the losses. Batches are those of the source, with
`reference_bt` beside them; held-out batches are the source's own, since only training selects tokens.

Supported sources are those with numbered windows: `text`, over any corpus. Generated tasks make new rows for every seed and
step, so that nothing computed beforehand belongs to them; `objective.reference` computes reference losses during training
instead. For a mixture, wrap each of its texts: `sources: [{kind: scored, source: …, scores: …}, …]`; every
source has to be wrapped, or none.

Pitfall: a store belongs to one data source, bit for bit: another length, tokenizer, corpus or `validation_fraction` is other data
and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.loss_store import LossStore
from torchstone.data.source import DocumentSpan
from torchstone.data.text import TextSource
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import ConfigError, DataError
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.storage.hashing import fingerprint_of

SUPPORTED = "text"


class ScoredConfig(Part):
    """A text source with stored losses of a reference model."""

    family: ClassVar[str] = "data"
    kind: Literal["scored"] = "scored"
    source: part_field("data") = Field(  # type: ignore[valid-type]
        default={"kind": "text"}, validate_default=True, description="the text whose losses are stored"
    )
    scores: str = Field(description="folder of the losses, from `torchstone score data`")

    @model_validator(mode="after")
    def _has_windows(self) -> Self:
        require_windows(self.source.kind)
        return self

    def vocabulary(self) -> int:
        """Number of token ids, without building the data."""
        found: int = self.source.vocabulary()
        return found

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        found: int = self.source.sequence_length()
        return found

    def build(self, cache: Path | None = None) -> ScoredSource:
        """Build the source and open the store; raises DataError where the store is of other data."""
        return ScoredSource(self.source.build(cache), LossStore(self.scores))


def require_windows(kind: str) -> None:
    """Raise ConfigError for a data kind whose rows have no number of their own."""
    if kind == SUPPORTED:
        return
    advice = {
        "mixture": "wrap each text source of the mixture in {kind: scored, source: …, scores: …} instead",
        "fill-in-the-middle": "its rows are cut anew for every seed; give the text itself",
        "scored": "it has stored losses already; give its source",
    }.get(
        kind,
        "its rows are made anew for every seed and step; set objective.reference, which scores during training",
    )
    raise ConfigError(f"losses can be stored for data of the kind {SUPPORTED}, and {kind} was given: {advice}.")


class ScoredSource:
    """DataSource of scored text.

    Args:
        source: the text.
        store: losses of its windows.

    Raises:
        DataError: the store is of another source.
    """

    def __init__(self, source: TextSource, store: LossStore) -> None:
        self.source, self.store = source, store
        header = store.header
        pairs = (
            ("data source", header.data, source.fingerprint),
            ("tokenizer", header.tokenizer, source.tokenizer.fingerprint),
            ("number of windows", header.windows, source.windows),
            ("length", header.length, source.length),
        )
        for what, stored, given in pairs[::-1]:
            if stored != given:
                raise DataError(
                    f"the losses in {store.path} are of another {what}: {stored} there, {given} in this recipe. Give the store "
                    "that was made for this data, or make one: torchstone score data RECIPE --reference MODEL --store PATH."
                )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.source.vocab_size

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.source.length

    @property
    def tokenizer(self) -> Tokenizer:
        """The text's own."""
        return self.source.tokenizer

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out text."""
        return self.source.bytes_per_token

    @property
    def fingerprint(self) -> str:
        """Hash of the text's fingerprint and of the stored losses."""
        return fingerprint_of(["scored", self.source.fingerprint, self.store.fingerprint])

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """The source's training rows with `reference_bt`."""
        batch = self.source.batch(seed, step, size, start, stop)
        losses_bt = self.store.losses(self.source.items(seed, step, size, start, stop))
        reference_bt = torch.from_numpy(losses_bt).masked_fill(batch.targets_bt == IGNORE, 0.0)
        return replace(batch, reference_bt=reference_bt)

    def evaluation(self, size: int, sequences: int) -> Iterator[Batch]:
        """The source's held-out windows."""
        return self.source.evaluation(size, sequences)

    def documents(self, seed: int, step: int, size: int) -> list[list[DocumentSpan]]:
        """Which documents are in each row of a training batch."""
        return self.source.documents(seed, step, size)
