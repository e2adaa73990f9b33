"""Additions of whole numbers, answered at once or column by column.

A sequence is a prompt with one of two responses; nothing in the prompt says which, so that a model trained on both learns
to give either:

    fast    123+456=579.
    slow    123+456=3+6+0=9,0;2+5+0=7,0;1+4+0=5,0;579.

A slow response goes from the last column to the first: digit + digit + carry = digit of the sum, new carry. The dot ends
every response. Both numbers have `digits` digits, the first of which is not 0. Only the tokens of the response are scored.
The task is the toy of the layer-gradients study (arXiv 2410.23743).

Held-out sequences are about problems (pairs of numbers) that no training sequence has: a fixed shuffle of all problems is cut
at `held_out`. A sequence's style is drawn with its problem.

Token ids are the places of characters in `ALPHABET`; 0 fills the row after the dot.

Shapes: b sequences · t tokens, one less than the longest text: targets are shifted by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from torchstone.data.batch import IGNORE
from torchstone.data.keyed import Keys, key, uniform
from torchstone.data.permutation import Permutation
from torchstone.data.synthetic.task import Rows, Task
from torchstone.recipe.part import Part

ALPHABET = " 0123456789+=,;."


class Problem(NamedTuple):
    """One addition as text."""

    prompt: str
    fast: str
    slow: str


class AdditionConfig(Part):
    """Additions written at once or column by column."""

    family: ClassVar[str] = "data"
    kind: Literal["addition"] = "addition"
    digits: int = Field(default=3, gt=1, le=6, description="digits of both numbers")
    slow: float = Field(default=0.5, ge=0, le=1, description="share of responses that go column by column")
    held_out: float = Field(default=0.05, gt=0, lt=1, description="share of the problems that training never sees")

    def vocabulary(self) -> int:
        """Number of token ids."""
        return len(ALPHABET)

    def sequence_length(self) -> int:
        """Tokens of a sequence: those of the longest text, less one."""
        return len("".join(written(10**self.digits - 1, 10**self.digits - 1)[::2])) - 1

    def build(self, cache: Path | None = None) -> Addition:
        """The task; nothing is cached."""
        return Addition(self)


class Addition(Task[AdditionConfig]):
    """DataSource of additions."""

    def __init__(self, settings: AdditionConfig) -> None:
        super().__init__(settings)
        self._numbers = 9 * 10 ** (settings.digits - 1)
        self._shuffle = Permutation(self._numbers**2, key("addition"))
        self._cut = max(1, round(settings.held_out * self._numbers**2))

    def rows(self, keys_b: Keys) -> Rows:
        """Training sequences."""
        return self._rows(keys_b, self._cut, self._numbers**2)

    def held_out(self, keys_b: Keys) -> Rows:
        """Sequences about held-out problems."""
        return self._rows(keys_b, 0, self._cut)

    def problems(self, count: int, start: int = 0) -> list[Problem]:
        """Held-out problems `start` … `start + count - 1`, all different; there are `held_out` times all of them."""
        assert start + count <= self._cut, f"there are {self._cut} held-out problems"
        return [self._problem(place) for place in self._shuffle(np.arange(start, start + count))]

    def _problem(self, place: int) -> Problem:
        first, second = divmod(int(place), self._numbers)
        lowest = 10 ** (self.settings.digits - 1)
        return written(lowest + first, lowest + second)

    def _rows(self, keys_b: Keys, low: int, high: int) -> Rows:
        draws_b2 = uniform(keys_b, 2)
        places_b = self._shuffle(low + (draws_b2[:, 0] * (high - low)).astype(np.int64))
        tokens_bt = np.zeros((len(keys_b), self.length), dtype=np.int64)
        targets_bt = np.full_like(tokens_bt, IGNORE)
        for row, (place, draw) in enumerate(zip(places_b, draws_b2[:, 1], strict=True)):
            problem = self._problem(place)
            text = encode(problem.prompt + (problem.slow if draw < self.settings.slow else problem.fast))
            first = len(problem.prompt) - 1
            tokens_bt[row, : len(text) - 1] = text[:-1]
            targets_bt[row, first : len(text) - 1] = text[first + 1 :]
        return tokens_bt, targets_bt


def written(first: int, second: int) -> Problem:
    """An addition as prompt, fast and slow response."""
    columns, carry = [], 0
    for a, b in zip(str(first)[::-1], str(second)[::-1], strict=True):
        total = int(a) + int(b) + carry
        columns.append(f"{a}+{b}+{carry}={total % 10},{total // 10};")
        carry = total // 10
    answer = f"{first + second}."
    return Problem(f"{first}+{second}=", answer, "".join(columns) + answer)


def encode(text: str) -> NDArray[np.int64]:
    """Token ids of a text of `ALPHABET`'s characters."""
    return np.array([ALPHABET.index(character) for character in text], dtype=np.int64)


def decode(tokens: NDArray[np.int64]) -> str:
    """The text of token ids, without the filling after the dot."""
    return "".join(ALPHABET[token] for token in tokens).rstrip()
