"""In-context recall: say again the value that a key had earlier in the same sequence.

A sequence is a row of cells of two tokens. A cell is a key with its value, or (with `filler_probability`) two
filler tokens. Each sequence has its own random map from keys to values, so nothing can be learnt by heart: at
every repeated key the value must be looked up in the context. Those positions, and no others, are scored; the
first time that a key occurs its value is not to be known. The task is the toy of the differential
transformer's study (arXiv:2410.05258) and of work on induction heads.

    token     k3  v7  f1  f0  k5  v2  k3  v7
    target                             v7

Token ids: keys first, then values, then fillers. Chance is 1 / values; values of different keys may coincide.

Stress: held-out sequences with `stress` times as much filler per pair at the same length, so that a fall of
accuracy is due to noise and not to positions that training never saw.

Shapes: b sequences · c cells · t query tokens · s key tokens (both 2c).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.keyed import Keys, integers, mix, uniform
from torchstone.data.synthetic.task import Rows, Task, score
from torchstone.errors import DataError
from torchstone.recipe.part import Part


class RecallConfig(Part):
    """In-context key-value recall."""

    family: ClassVar[str] = "data"
    kind: Literal["recall"] = "recall"
    keys: int = Field(default=8, gt=0, description="different keys")
    values: int = Field(default=8, gt=0, description="different values")
    cells: int = Field(default=32, gt=1, description="cells of two tokens in a sequence")
    filler_probability: float = Field(default=0.25, ge=0, lt=1, description="chance that a cell is filler")
    fillers: int = Field(default=8, gt=0, description="different filler tokens")
    stress: float = Field(
        default=1.0, ge=1, description="filler per pair in held-out sequences, as a multiple of training's"
    )

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.keys + self.values + self.fillers

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.cells

    def build(self, cache: Path | None = None) -> Recall:
        """The task; nothing is cached."""
        return Recall(self)


class Recall(Task[RecallConfig]):
    """DataSource of recall sequences."""

    def rows(self, keys_b: Keys) -> Rows:
        """Training sequences."""
        return self._rows(keys_b, 1.0)

    def held_out(self, keys_b: Keys) -> Rows:
        """Held-out sequences, with the stress that the settings ask for."""
        return self._rows(keys_b, self.settings.stress)

    def evaluation(self, size: int, sequences: int, filler_factor: float | None = None) -> Iterator[Batch]:
        """Held-out items in batches of `size`.

        Args:
            filler_factor: filler per pair as a multiple of training's; None: the `stress` of the settings.
        """
        if filler_factor is None:
            return super().evaluation(size, sequences)
        if filler_factor <= 0:
            raise DataError(f"filler_factor is {filler_factor}; give a number above 0 (1 is as in training).")
        stressed = Recall(self.settings.model_copy(update={"stress": filler_factor}))
        return stressed.evaluation(size, sequences)

    def _rows(self, keys_b: Keys, filler_factor: float) -> Rows:
        task, b = self.settings, len(keys_b)
        draws = [mix(keys_b ^ np.uint64(stream)) for stream in range(1, 5)]
        map_bk = integers(draws[0], task.keys, task.values)
        keys_bc = integers(draws[1], task.cells, task.keys)
        filler_bc = uniform(draws[2], task.cells) < _more_filler(task.filler_probability, filler_factor)
        filler_bt = integers(draws[3], self.length, task.fillers) + task.keys + task.values
        tokens_bt = np.empty((b, self.length), dtype=np.int64)
        tokens_bt[:, 0::2] = keys_bc
        tokens_bt[:, 1::2] = np.take_along_axis(map_bk, keys_bc, axis=1) + task.keys
        tokens_bt = np.where(np.repeat(filler_bc, 2, axis=1), filler_bt, tokens_bt)
        targets_bt = np.full_like(tokens_bt, IGNORE)
        repeated_bc = _repeated(np.where(filler_bc, -1, keys_bc), task.keys)
        targets_bt[:, 0::2] = np.where(repeated_bc, tokens_bt[:, 1::2], IGNORE)
        return tokens_bt, targets_bt

    def answer_positions(self, tokens_bt: Tensor) -> Tensor:
        """See `answer_positions`."""
        return answer_positions(tokens_bt, self.settings.keys)


def _more_filler(probability: float, factor: float) -> float:
    """Probability of filler whose odds are `factor` times those of `probability`."""
    return factor * probability / (1 - probability + factor * probability)


def _repeated(keys_bc: NDArray[np.int64], keys: int) -> NDArray[np.bool_]:
    """True where a key (not -1) also stands in an earlier cell."""
    seen_bkc = keys_bc[:, None, :] == np.arange(keys)[None, :, None]
    before_bkc = np.cumsum(seen_bkc, axis=2) > 1
    return (seen_bkc & before_bkc).any(axis=1)


def answer_positions(tokens_bt: Tensor, keys: int) -> Tensor:
    """bool [b, t, s]: True if query t is a key and s holds its value in an earlier cell.

    Args:
        tokens_bt: recall sequences.
        keys: number of key tokens, which are the ids 0 … keys-1.

    Rows of queries that are no key, or a key that occurs for the first time, are empty.
    """
    steps_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
    key_bt = tokens_bt < keys
    before_bs = tokens_bt.roll(1, dims=1)  # the token before each position; position 0 is excluded below
    same_bts = tokens_bt[:, :, None] == before_bs[:, None, :]
    earlier_ts = (steps_t[None, :] < steps_t[:, None]) & (steps_t[None, :] > 0)
    return same_bts & earlier_ts & key_bt[:, :, None]


__all__ = ["Recall", "RecallConfig", "answer_positions", "score"]
