"""Recall over a known gap: each key of a sequence is given a value once, and asked for many times without saying it again.

A sequence is a row of cells of two tokens. A definition is a key with its value; a question is a key that was defined, with a
filler token in the value's place; other cells are filler. The values of keys are drawn anew for each row, so nothing can be
learnt by heart, and the answer to a question stands at exactly one place. Its distance, the gap, is 1, 3, 5 … up to `max_gap`
tokens.

    token     k3  v7  f1  f0  k5  v2  k3  f4  k5  f1
    target                             v7      v2        gaps 5 and 3

Definitions stand in random cells; a question asks for a random key among those defined at most `max_gap` before it. Ordinary
recall (`recall`) repeats the value with every question, so that the nearest copy answers and long distances are never needed.

`gaps` says the gap of every question, for accuracy by distance; `answer_positions` where its answer is.

Token ids: keys first, then values, then fillers. Chance is 1 / values.

Shapes: b sequences · c cells · k keys · t query tokens · s key tokens (both 2c).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE
from torchstone.data.keyed import Keys, integers, mix, uniform
from torchstone.data.synthetic.task import Rows, Task
from torchstone.recipe.part import Part


class GapRecallConfig(Part):
    """Key-value recall with one known distance per question."""

    family: ClassVar[str] = "data"
    kind: Literal["gap-recall"] = "gap-recall"
    keys: int = Field(default=8, gt=0, description="different keys, each defined once")
    values: int = Field(default=8, gt=1, description="different values")
    fillers: int = Field(default=8, gt=0, description="different filler tokens")
    cells: int = Field(default=64, gt=1, description="cells of two tokens in a sequence")
    max_gap: int = Field(default=100, gt=0, description="longest distance of question and answer in tokens")
    filler_probability: float = Field(default=0.25, ge=0, lt=1, description="chance that a cell is filler")

    @model_validator(mode="after")
    def _room(self) -> GapRecallConfig:
        if self.cells <= self.keys:
            raise ValueError(
                f"{self.keys} keys need a cell each and questions some more, but there are {self.cells} cells; give more cells "
                "or fewer keys"
            )
        return self

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.keys + self.values + self.fillers

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.cells

    def build(self, cache: Path | None = None) -> GapRecall:
        """The task; nothing is cached."""
        return GapRecall(self)


class GapRecall(Task[GapRecallConfig]):
    """DataSource of recall over known gaps."""

    def rows(self, keys_b: Keys) -> Rows:
        """Definitions in random cells, questions and filler in the others."""
        task, row_b1 = self.settings, np.arange(len(keys_b))[:, None]
        draws = [mix(keys_b ^ np.uint64(stream)) for stream in range(1, 6)]
        defined_bk = uniform(draws[0], task.cells).argsort(axis=1)[:, : task.keys]
        value_bk = integers(draws[1], task.keys, task.values) + task.keys
        gap_bck = 2 * (np.arange(task.cells)[None, :, None] - defined_bk[:, None, :]) - 1
        known_bck = (gap_bck > 0) & (gap_bck <= task.max_gap)
        preference_bck = uniform(draws[2], task.cells * task.keys).reshape(known_bck.shape)
        asked_bc = np.where(known_bck, preference_bck, -1).argmax(axis=2)
        question_bc = known_bck.any(axis=2) & (uniform(draws[3], task.cells) >= task.filler_probability)
        question_bc[row_b1, defined_bk] = False
        tokens_bt = integers(draws[4], self.length, task.fillers) + task.keys + task.values
        targets_bt = np.full_like(tokens_bt, IGNORE)
        tokens_bt[:, 0::2] = np.where(question_bc, asked_bc, tokens_bt[:, 0::2])
        targets_bt[:, 0::2] = np.where(question_bc, np.take_along_axis(value_bk, asked_bc, axis=1), IGNORE)
        tokens_bt[row_b1, 2 * defined_bk] = np.arange(task.keys)
        tokens_bt[row_b1, 2 * defined_bk + 1] = value_bk
        return tokens_bt, targets_bt

    def answer_positions(self, tokens_bt: Tensor) -> Tensor:
        """bool [b, t, s]: True if query t is a question and s holds the value of its key."""
        steps_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        before_bs = tokens_bt.roll(1, dims=1)
        same_bts = (tokens_bt[:, :, None] == before_bs[:, None, :]) & (tokens_bt < self.settings.keys)[:, :, None]
        first_value = self.settings.keys
        value_bs = (tokens_bt >= first_value) & (tokens_bt < first_value + self.settings.values)
        return same_bts & value_bs[:, None, :] & (steps_t[None, :] < steps_t[:, None]) & (steps_t > 0)

    def gaps(self, tokens_bt: Tensor) -> Tensor:
        """int64 [b, t]: tokens from a question back to its answer; 0 where nothing is asked."""
        answers_bts = self.answer_positions(tokens_bt)
        steps_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        return torch.where(answers_bts.any(-1), steps_t - answers_bts.int().argmax(-1), 0)
