"""A small language in which half of the tokens are noise, and which ones is known.

    next = table[x_{t-2}, x_{t-1}]          a fixed random table, `slip` of the tokens drawn at random instead
    40 % of the rows                        noise from end to end: independent random tokens
    15 % of the tokens of other rows        noise, put in the place of the language's token

With the default shares 49 % of training targets are noise, flagged in `noise_bt`. Nothing distinguishes a noise token from
another but that it does not follow from its context. Slips belong to the language and are not flagged. Held-out rows are the
language itself, slips included, without noise.

`context` first positions of a row have no target, so that a model that sees a fixed number of tokens has all of them at every
scored position, and each scored target has the two tokens that decide it.

Shapes: b sequences · t tokens.

Pitfall: after a noise token the language goes on from it, so that noise changes what is right for the next two tokens but does
not make them unpredictable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.keyed import Keys, integers, key, uniform
from torchstone.data.source import row_range
from torchstone.data.synthetic.task import Rows, Task, as_batch
from torchstone.recipe.part import Part


class NoisyTrigramConfig(Part):
    """A language of pairs with flagged noise."""

    family: ClassVar[str] = "data"
    kind: Literal["noisy-trigram"] = "noisy-trigram"
    vocab_size: int = Field(default=32, gt=1, description="token ids")
    length: int = Field(default=19, gt=1, description="tokens of a sequence")
    context: int = Field(default=3, ge=1, description="first positions of a sequence that have no target")
    slip: float = Field(default=0.05, ge=0, le=1, description="share of random tokens in the language itself")
    noise_documents: float = Field(default=0.4, ge=0, le=1, description="share of rows that are noise throughout")
    noise_tokens: float = Field(default=0.15, ge=0, le=1, description="share of noise tokens in other rows")
    table_seed: int = Field(default=0, ge=0, description="which table; training seeds do not change it")

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.vocab_size

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def build(self, cache: Path | None = None) -> NoisyTrigram:
        """The task; nothing is cached."""
        return NoisyTrigram(self)


class NoisyTrigram(Task[NoisyTrigramConfig]):
    """DataSource of noisy sequences; held-out ones are clean."""

    @cached_property
    def table_vv(self) -> NDArray[np.int64]:
        """The token that follows a pair: row = the earlier one."""
        size = self.vocab_size
        return integers(key("noisy-trigram table", self.settings.table_seed, np.arange(size)), size, size)

    def rows(self, keys_b: Keys) -> Rows:
        """Noisy sequences, without their flags."""
        tokens_bt, targets_bt, _ = self._noisy(keys_b)
        return tokens_bt, targets_bt

    def held_out(self, keys_b: Keys) -> Rows:
        """Sequences of the language without noise."""
        tokens_bt, targets_bt, _ = self._sequences(keys_b, 0.0, 0.0)
        return tokens_bt, targets_bt

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start … stop-1 of the global batch, with `noise_bt`."""
        rows = row_range(size, start, stop)
        tokens_bt, targets_bt, noise_bt = self._noisy(key("train", seed, step, np.arange(rows.start, rows.stop)))
        batch = as_batch((tokens_bt, targets_bt), tuple(step * size + row for row in rows))
        return replace(batch, noise_bt=torch.from_numpy(noise_bt))

    def clean(self, seed: int, count: int, size: int) -> Iterator[Batch]:
        """`count` clean sequences for a reference model, in batches of `size`; no training or held-out row is among them."""
        for start in range(0, count, size):
            numbers = np.arange(start, min(start + size, count))
            rows = self.held_out(key("clean", seed, numbers))
            yield as_batch(rows, tuple(numbers.tolist()))

    def answers(self, tokens_bt: Tensor) -> Tensor:
        """The language's own next token at every position but the first, whose pair is not complete: int64 [b, t-1]."""
        table_vv = torch.from_numpy(self.table_vv).to(tokens_bt.device)
        found_bt: Tensor = table_vv[tokens_bt[:, :-1], tokens_bt[:, 1:]]
        return found_bt

    def _noisy(self, keys_b: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        return self._sequences(keys_b, self.settings.noise_documents, self.settings.noise_tokens)

    def _sequences(
        self, keys_b: Keys, documents: float, share: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens, targets and flags of targets, [b, t] each."""
        settings, count = self.settings, self.length + 1
        draws_bt = uniform(keys_b, 3 * count + 1)
        random_bt = (draws_bt[:, :count] * self.vocab_size).astype(np.int64)
        noise_bt = (draws_bt[:, count : 2 * count] < share) | (draws_bt[:, -1:] < documents)
        free_bt = noise_bt | (draws_bt[:, 2 * count : 3 * count] < settings.slip)
        tokens_bt = random_bt.copy()
        for t in range(2, count):
            follows_b = self.table_vv[tokens_bt[:, t - 2], tokens_bt[:, t - 1]]
            tokens_bt[:, t] = np.where(free_bt[:, t], random_bt[:, t], follows_b)
        targets_bt, noise_bt = tokens_bt[:, 1:].copy(), noise_bt[:, 1:].copy()
        targets_bt[:, : settings.context] = IGNORE
        noise_bt[:, : settings.context] = False
        return tokens_bt[:, :-1], targets_bt, noise_bt
