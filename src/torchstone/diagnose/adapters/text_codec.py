"""One face for the tokenizers of transformers and of torchstone; loaded when first needed.

Encoding never adds special tokens; those that the tokenizer itself would put before a text are `first_tokens`. A model without
a tokenizer works until text is to be encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torchstone.errors import ConfigError

PROBE = "a"  # any text of at least one token


class TextCodec:
    """Text to token ids and back.

    Args:
        load: gives a tokenizer of transformers or of torchstone, or None where there is none.
        name: the model, for messages.
    """

    def __init__(self, load: Callable[[], Any | None], name: str) -> None:
        self._load, self._name = load, name

    @cached_property
    def _tokenizer(self) -> Any | None:
        return self._load()

    def size(self) -> int | None:
        """Number of token ids; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        own = getattr(self._tokenizer, "__len__", None)  # transformers' vocab_size leaves out added tokens
        return int(self._tokenizer.vocab_size) if own is None else len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids; raises ConfigError where there is no tokenizer."""
        if self._tokenizer is None:
            raise ConfigError(f"{self._name} has no tokenizer; give one: --tokenizer PATH (tokenizer=PATH in Python).")
        if callable(self._tokenizer):
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return list(self._tokenizer.encode(text))

    def first_tokens(self) -> list[int]:
        """What the tokenizer, asked for special tokens, puts before a text: BOS for Llama and Gemma, nothing for GPT-2 and Qwen.

        Tokenizers of torchstone put nothing there, and neither does a model without one.
        """
        if not callable(self._tokenizer):
            return []
        plain, whole = self.encode(PROBE), list(self._tokenizer(PROBE, verbose=False)["input_ids"])
        places = (at for at in range(len(whole) - len(plain), -1, -1) if whole[at : at + len(plain)] == plain)
        return whole[: next(places, 0)] if plain else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Text; ids as numbers where there is no tokenizer."""
        ids = [int(token) for token in tokens]
        return " ".join(map(str, ids)) if self._tokenizer is None else str(self._tokenizer.decode(ids))
