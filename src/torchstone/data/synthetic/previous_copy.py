"""Previous-token copy: say the token before. Needs position and nothing else.

    token     a  c  c  b
    target       a  c  c

Symbols are drawn independently, so content tells nothing about the answer: the model must attend one token back. A head that
turns queries and keys fast enough does so by construction; one layer without positions cannot, because equal tokens get
equal weight (Barbero et al., arXiv 2410.06205, Prop. 5.2 and Thm 5.3). Chance is 1 / symbols. The first token has no answer.

Shapes: b sequences · t tokens.

Pitfall: models without positions can learn to count through the causal mask when they are deep enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.keyed import Keys, integers
from torchstone.data.synthetic.task import Rows, Task
from torchstone.errors import DataError
from torchstone.recipe.part import Part


class PreviousCopyConfig(Part):
    """Copy the token before."""

    family: ClassVar[str] = "data"
    kind: Literal["previous-copy"] = "previous-copy"
    symbols: int = Field(default=16, gt=1, description="different tokens")
    length: int = Field(default=64, gt=1, description="tokens of a sequence")

    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.symbols

    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.length

    def build(self, cache: Path | None = None) -> PreviousCopy:
        """The task; nothing is cached."""
        return PreviousCopy(self)


class PreviousCopy(Task[PreviousCopyConfig]):
    """DataSource of previous-token copy."""

    def rows(self, keys_b: Keys) -> Rows:
        """Independent symbols, and each one's predecessor as the target."""
        tokens_bt = integers(keys_b, self.length, self.settings.symbols)
        targets_bt = np.full_like(tokens_bt, IGNORE)
        targets_bt[:, 1:] = tokens_bt[:, :-1]
        return tokens_bt, targets_bt

    def evaluation(self, size: int, sequences: int, length: int | None = None) -> Iterator[Batch]:
        """Held-out items in batches of `size`, of another `length` if one is given.

        Raises:
            DataError: no token of that length has one before it.
        """
        if length is None:
            return super().evaluation(size, sequences)
        if length < 2:
            raise DataError(
                f"length is {length}, and only the second token has one before it to copy; give at least 2."
            )
        return PreviousCopy(self.settings.model_copy(update={"length": length})).evaluation(size, sequences)
