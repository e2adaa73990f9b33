"""One face for the tokenizers of transformers and of torchstone; loaded when first needed.

Encoding never adds special tokens; those that the tokenizer itself would put before a text are `first_tokens`. A model without
a tokenizer works until text is to be encoded.

`spans` says which characters of the text each token stands for. Fast tokenizers and torchstone's know it. For all others it
follows from decoding each token after its neighbour: the characters that the pair has more than the neighbour alone. Tokens that
hold only a part of a character all span that character, as those of fast tokenizers do.

Pitfall: a tokenizer that changes text (case, accents, spaces) decodes to another length; its spans are then refused, because
every one behind the change would be shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torchstone.errors import ConfigError, DataError

PROBE = "a"  # any text of at least one token
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to
LONGEST_PART = 16  # tokens that one character may have
Spans = tuple[list[int], list[tuple[int, int]]]


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

    def spans(self, text: str, special: bool = False) -> Spans:
        """Token ids, and for each the characters start … end-1 of the text that it stands for.

        Args:
            text: any text.
            special: with the special tokens that the tokenizer puts around a text; they span (0, 0).

        Raises:
            ConfigError: there is no tokenizer. DataError: where its tokens lie in this text cannot be told.
        """
        plain = self.encode(text)
        own = None if callable(self._tokenizer) else getattr(self._tokenizer, "spans", None)
        if own is not None:  # a tokenizer of torchstone
            ids, spans = own(text)
            self._check(spans, len(text.rstrip()), len(text))  # it may drop spaces at the end
            return ids, spans
        if getattr(self._tokenizer, "is_fast", False):
            found = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)  # type: ignore[misc]
            ids, spans = list(found["input_ids"]), [(int(start), int(end)) for start, end in found["offset_mapping"]]
            self._check(spans, len(text.rstrip()), len(text))
            return ids, spans
        spans = self._decoded_spans(plain, text)
        self._check(spans, len(text), len(text))
        if not special or not callable(self._tokenizer):
            return plain, spans
        whole = list(self._tokenizer(text, verbose=False)["input_ids"])
        before = _place(plain, whole)
        after = len(whole) - before - len(plain)
        return whole, [(0, 0)] * before + spans + [(0, 0)] * after

    def _decoded_spans(self, ids: list[int], text: str) -> list[tuple[int, int]]:
        """Spans from the lengths of decoded neighbours: token i is what `i-1, i` decode to beyond `i-1`."""
        spans: list[tuple[int, int]] = []
        start, first, known = 0, 0, ""  # of the character or token at hand; `known` is its left neighbour's text
        for at in range(len(ids)):
            left = max(0, first - 1)
            decoded = self.decode(ids[left : at + 1])
            end = start + max(0, len(decoded) - len(known))
            partial = decoded.endswith(NO_CHARACTER)
            if partial and text[end - 1 : end] == NO_CHARACTER:  # the text has this character: is it whole?
                partial = len(self.decode(ids[left : at + 2])) == len(decoded)
            if (partial or end == start) and at - first < LONGEST_PART and at + 1 < len(ids):
                continue
            spans += [(start, end)] * (at + 1 - first)
            start, first, known = end, at + 1, self.decode(ids[at : at + 1])
        return spans

    def _check(self, spans: list[tuple[int, int]], least: int, length: int) -> None:
        """Refuse spans that go back, or do not end where the text does: from `least` to `length`."""
        real = [(start, end) for start, end in spans if end > start]
        ordered = all(a <= c and b <= d for (a, b), (c, d) in zip(real, real[1:], strict=False))
        reached = real[-1][1] if real else 0
        if ordered and least <= reached <= length:
            return
        raise DataError(
            f"the tokenizer of {self._name} does not say which characters its tokens stand for: decoding them one after another "
            f"ends at character {reached:,} of a text of {length:,}. Give the model's fast tokenizer (tokenizer=PATH of one "
            "with a tokenizer.json)."
        )

    def first_tokens(self) -> list[int]:
        """What the tokenizer, asked for special tokens, puts before a text: BOS for Llama and Gemma, nothing for GPT-2 and Qwen.

        Tokenizers of torchstone put nothing there, and neither does a model without one.
        """
        if not callable(self._tokenizer):
            return []
        plain, whole = self.encode(PROBE), list(self._tokenizer(PROBE, verbose=False)["input_ids"])
        return whole[: _place(plain, whole)] if plain else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Text; ids as numbers where there is no tokenizer."""
        ids = [int(token) for token in tokens]
        return " ".join(map(str, ids)) if self._tokenizer is None else str(self._tokenizer.decode(ids))


def _place(plain: list[int], whole: list[int]) -> int:
    """Where the tokens of a text begin in those with special tokens around it; 0 where they are not found."""
    places = (at for at in range(len(whole) - len(plain), -1, -1) if whole[at : at + len(plain)] == plain)
    return next(places, 0)
