"""What every tokenizer can do. Token ids are 0 … vocab_size-1; one of them ends a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back.

    `end_of_document` is an id that no text encodes to: text that spells a special token stays text.
    `fingerprint`: hexadecimal, equal exactly when the encoding is equal.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without the end-of-document id."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; the end-of-document id and ids without text give nothing."""
        ...
