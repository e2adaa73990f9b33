"""Pair recall: hold many pairs at once, then say the value of every key. Needs state, and nothing else.

A pair is one token that stands for a key and its value together, so that no layer is needed to bring the two together. P pairs
with different keys come first, then a query for each of the same keys in random order; the answer is the value that the
key has in this sequence.

    token     k2v0  k0v3  k1v1  k0?  k2?  k1?
    target                       v3   v0   v1

Nothing can be forgotten before the queries: at the first one all P pairs must be known. A model whose state has few numbers
runs out of room as P grows, whatever its number of parameters; attention keeps every pair. This is associative recall with many
queries (Arora et al., arXiv 2312.04927) without the work of joining keys to values. Chance is 1 / values.

Token ids: pairs (key · values + value), then queries, then values, which are only ever targets.

Shapes: b sequences · t tokens · n keys · p pairs of a sequence.

Pitfall: every pair has an embedding of its own, keys · values of them, to be learnt one by one: tables much larger than the
pairs seen in training leave recall untrained in every model alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from torchstone.data.batch import IGNORE
from torchstone.data.keyed import Keys, integers, mix, uniform
from torchstone.data.synthetic.task import Rows, Task
from torchstone.recipe.part import Part


class PairRecallConfig(Part):
    """Recall of all pairs of a sequence."""

    family: ClassVar[str] = "data"
    kind: Literal["pair-recall"] = "pair-recall"
    pairs: int = Field(default=8, gt=0, description="pairs of a sequence, each asked for once")
    keys: int = Field(default=16, gt=0, description="different keys, at least as many as pairs")
    values: int = Field(default=16, gt=1, description="different values")

    @model_validator(mode="after")
    def _enough_keys(self) -> PairRecallConfig:
        if self.pairs > self.keys:
            raise ValueError(
                f"{self.pairs} pairs of a sequence have different keys, and there are {self.keys} keys; give more keys or "
                "fewer pairs"
            )
        return self

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.keys * self.values + self.keys + self.values

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return 2 * self.pairs

    def build(self, cache: Path | None = None) -> PairRecall:
        """The task; nothing is cached."""
        return PairRecall(self)


class PairRecall(Task[PairRecallConfig]):
    """DataSource of pairs and queries."""

    def rows(self, keys_b: Keys) -> Rows:
        """Pairs of random keys and values, then their queries."""
        task = self.settings
        draws = [mix(keys_b ^ np.uint64(stream)) for stream in range(1, 4)]
        first_query, first_value = task.keys * task.values, task.keys * task.values + task.keys
        keys_bp = uniform(draws[0], task.keys).argsort(axis=1)[:, : task.pairs]
        values_bp = integers(draws[1], task.pairs, task.values)
        order_bp = uniform(draws[2], task.pairs).argsort(axis=1)
        asked_bp = np.take_along_axis(keys_bp, order_bp, axis=1)
        tokens_bt = np.concatenate([keys_bp * task.values + values_bp, first_query + asked_bp], axis=1)
        targets_bt = np.full_like(tokens_bt, IGNORE)
        targets_bt[:, task.pairs :] = first_value + np.take_along_axis(values_bp, order_bp, axis=1)
        return tokens_bt, targets_bt
