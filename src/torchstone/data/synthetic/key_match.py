"""Key match at any distance: find the token that carries a key, however far back. Needs meaning and not position.

A carrier is one token that stands for a key and a value together. At the end of each sequence every key is asked for once;
the answer is the value that the key's carrier has in this sequence. Everything else is filler.

    token     f2  k1v3  f0  f5  k0v1  f2  k0?  k1?
    target                                 v1   v3

A head that compares keys by content solves it at every distance; order and distance tell nothing: places of the carriers,
their values and the order of the questions are random. Training asks over distances within its own length. `evaluation` with
a longer `length` asks over longer ones, which a rotated match may miss and one that does not turn may not (Barbero et al.,
arXiv 2410.06205, Thm 6.1). Chance is 1 / values.

Token ids: carriers (key · values + value), then questions, then fillers, then values, which are only ever targets.

Shapes: b sequences · t tokens · k keys · f body tokens (all before the questions).

Pitfall: more filler between carrier and question also dilutes attention, in every model alike: compare arms, not lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.keyed import Keys, integers, mix, uniform
from torchstone.data.synthetic.task import Rows, Task
from torchstone.errors import DataError
from torchstone.recipe.part import Part


class KeyMatchConfig(Part):
    """Match keys by content over random distances."""

    family: ClassVar[str] = "data"
    kind: Literal["key-match"] = "key-match"
    keys: int = Field(default=4, gt=0, description="different keys, each asked for once")
    values: int = Field(default=4, gt=1, description="different values")
    fillers: int = Field(default=8, gt=0, description="different filler tokens")
    length: int = Field(default=64, gt=1, description="tokens of a sequence; distances are below it")

    @model_validator(mode="after")
    def _room(self) -> KeyMatchConfig:
        if self.length < 2 * self.keys:
            raise ValueError(
                f"{self.keys} keys need a carrier and a question each, and length is {self.length}; give at least "
                f"{2 * self.keys}, or fewer keys"
            )
        return self

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.keys * self.values + self.keys + self.fillers + self.values

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def build(self, cache: Path | None = None) -> KeyMatch:
        """The task; nothing is cached."""
        return KeyMatch(self)


class KeyMatch(Task[KeyMatchConfig]):
    """DataSource of key matches."""

    def rows(self, keys_b: Keys) -> Rows:
        """Filler with carriers at random places, then every question in random order."""
        task, body = self.settings, self.settings.length - self.settings.keys
        draws = [mix(keys_b ^ np.uint64(stream)) for stream in range(1, 5)]
        questions, first_value = task.keys * task.values, task.vocabulary() - task.values
        values_bk = integers(draws[0], task.keys, task.values)
        places_bk = uniform(draws[1], body).argsort(axis=1)[:, : task.keys]
        asked_bk = uniform(draws[2], task.keys).argsort(axis=1)
        body_bf = integers(draws[3], body, task.fillers) + questions + task.keys
        np.put_along_axis(body_bf, places_bk, np.arange(task.keys) * task.values + values_bk, axis=1)
        tokens_bt = np.concatenate([body_bf, questions + asked_bk], axis=1)
        targets_bt = np.full_like(tokens_bt, IGNORE)
        targets_bt[:, body:] = first_value + np.take_along_axis(values_bk, asked_bk, axis=1)
        return tokens_bt, targets_bt

    def evaluation(self, size: int, sequences: int, length: int | None = None) -> Iterator[Batch]:
        """Held-out items in batches of `size`; a longer `length` asks over longer distances.

        Raises:
            DataError: the length has no room for carriers and questions.
        """
        if length is None:
            return super().evaluation(size, sequences)
        if length < 2 * self.settings.keys:
            raise DataError(
                f"length is {length}, too short for {self.settings.keys} carriers and questions; give at least "
                f"{2 * self.settings.keys}."
            )
        return KeyMatch(self.settings.model_copy(update={"length": length})).evaluation(size, sequences)

    def distances(self, tokens_bt: Tensor) -> Tensor:
        """int64 [b, t]: tokens from each question back to its carrier; 0 where nothing is asked."""
        task = self.settings
        questions = task.keys * task.values
        asked_bt = tokens_bt - questions
        asks_bt = (asked_bt >= 0) & (asked_bt < task.keys)
        carried_bs = torch.where(tokens_bt < questions, tokens_bt // task.values, -1)
        place_bt = (carried_bs[:, :, None] == asked_bt[:, None, :]).int().argmax(dim=1)
        steps_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        return torch.where(asks_bt, steps_t - place_bt, 0)
