"""Far tag: remember the first token of a sequence and say it again at every marker.

    token     g5  f1  f0  f3   |  f2  f2  f0   |  f1 …
    target                    g5              g5

The tag stands at position 0 and nowhere else, markers at every `every`-th position; everything between is drawn at random. One
symbol has to be carried over any distance and nothing has to be found, so a state of fixed size suffices, while a window
sees the tag only as far as its layers reach together: depth · (window − 1) tokens for a window that counts the current one.

`distances` says how far back the tag is, for accuracy by distance. Token ids: tags first, then fillers, then the marker.
Chance is 1 / tags.

Shapes: b sequences · t tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from torchstone.data.batch import IGNORE
from torchstone.data.keyed import Keys, integers, mix
from torchstone.data.synthetic.task import Rows, Task
from torchstone.recipe.part import Part


class FarTagConfig(Part):
    """Carry the first token to every marker."""

    family: ClassVar[str] = "data"
    kind: Literal["far-tag"] = "far-tag"
    tags: int = Field(default=8, gt=1, description="different tags")
    fillers: int = Field(default=8, gt=0, description="different filler tokens")
    every: int = Field(default=16, gt=0, description="tokens from one marker to the next")
    length: int = Field(default=128, gt=1, description="tokens of a sequence")

    @model_validator(mode="after")
    def _marked(self) -> FarTagConfig:
        if self.every >= self.length:
            raise ValueError(
                f"markers stand every {self.every} tokens and a sequence has {self.length}, which leaves none; choose "
                "`every` below `length`"
            )
        return self

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.tags + self.fillers + 1

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def build(self, cache: Path | None = None) -> FarTag:
        """The task; nothing is cached."""
        return FarTag(self)


class FarTag(Task[FarTagConfig]):
    """DataSource of far tags."""

    def rows(self, keys_b: Keys) -> Rows:
        """A tag, fillers, and markers whose target is the tag."""
        task = self.settings
        tag_b = integers(mix(keys_b ^ np.uint64(1)), 1, task.tags)[:, 0]
        tokens_bt = integers(mix(keys_b ^ np.uint64(2)), self.length, task.fillers) + task.tags
        targets_bt = np.full_like(tokens_bt, IGNORE)
        tokens_bt[:, 0] = tag_b
        tokens_bt[:, task.every :: task.every] = task.tags + task.fillers
        targets_bt[:, task.every :: task.every] = tag_b[:, None]
        return tokens_bt, targets_bt

    def distances(self) -> Tensor:
        """int64 [t]: tokens from a marker back to the tag; 0 where nothing is asked."""
        index_t = torch.arange(self.length)
        return torch.where(index_t % self.settings.every == 0, index_t, 0)
