"""A corpus with injected noise whose place is known: what a selection of tokens ought to leave out.

    corpus: {kind: noisy, corpus: {kind: files, paths: raw/*.jsonl}, shuffled: 0.2, random_spans: 0.1, scanned: 0.02}

Three kinds of noise, as raw web text has them, each with a share of its own:

    shuffled       share of the documents whose words stand in random order (spaces stay where they are)
    random_spans   share of the characters of the other documents that are replaced by runs of random printable characters
    scanned        share of their characters that are damaged as by optical character recognition: a look-alike where there
                   is one (l and 1, O and 0, m and rn), else the other case, twice, or nothing

Only training text is corrupted: the documents are divided into training and held-out ones first, so that losses on held-out text
are losses on clean text, and a tokenizer that is trained on the corpus is trained on clean text.

Every changed character is flagged, and where one is left out the one after it. A token is noise if any of its characters is, and
a batch carries the flags of its targets as `noise_bt`. The token that ends a document is never noise. Noise is a pure function of
(noise_seed, document's id, text).

Pitfall: words after a damaged one are not flagged although their context is damaged; flags say what was put in, not what is hard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from torchstone.data.corpus import Corpus, Document, Reject
from torchstone.data.keyed import Keys, key, uniform, words
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import ConfigError
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.storage.hashing import fingerprint_of

_VERSION = 2  # raised when the same settings give other noise
_PRINTABLE = "".join(map(chr, range(33, 127)))
_ALIKE = {
    "l": "1", "1": "l", "I": "l", "O": "0", "o": "c", "0": "O", "c": "e", "e": "c", "m": "rn", "n": "ri", "h": "b", "b": "h",
    "S": "5", "5": "S", "B": "8", "8": "B", "g": "q", "q": "g", "t": "f", "f": "t", "u": "v", "v": "u", "w": "vv", "d": "cl",
    ",": ".", ".": ",", ";": ":", ":": ";",
}  # fmt: skip


class NoisyConfig(Part):
    """A corpus with flagged noise in its training documents."""

    family: ClassVar[str] = "corpus"
    kind: Literal["noisy"] = "noisy"
    corpus: part_field("corpus") = Field(  # type: ignore[valid-type]
        default={"kind": "stdlib"}, validate_default=True, description="the clean corpus"
    )
    shuffled: float = Field(default=0.2, ge=0, le=1, description="share of documents whose words are shuffled")
    random_spans: float = Field(
        default=0.1, ge=0, le=0.9, description="share of characters of the others that are random instead"
    )
    span: int = Field(default=24, gt=0, description="characters of a run of random ones")
    scanned: float = Field(default=0.02, ge=0, le=0.9, description="share of their characters damaged as by scanning")
    noise_seed: int = Field(default=0, ge=0, description="which noise; training seeds do not change it")

    @model_validator(mode="after")
    def _wraps_clean_text(self) -> Self:
        if self.corpus.kind == self.kind:
            raise ValueError(
                "corpus: noisy was given a noisy corpus, whose own noise would be lost; set all shares of noise in one of them"
            )
        return self

    def build(self) -> NoisyCorpus:
        """The corpus; raises what the clean one raises."""
        return NoisyCorpus(self, self.corpus.build())


@dataclass(frozen=True)
class Corrupted:
    """A text with noise and, for each of its characters, whether it is noise."""

    text: str
    noise: NDArray[np.bool_]


class NoisyCorpus:
    """Clean documents, and what becomes of those that are trained on.

    Args:
        settings: shares and seed.
        clean: the corpus that is wrapped; its bad rows are reported and counted as they are without noise.
    """

    def __init__(self, settings: NoisyConfig, clean: Corpus) -> None:
        self.settings, self.clean = settings, clean

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the clean corpus and of the settings."""
        settings = self.settings.model_dump(mode="json", exclude={"corpus"})
        return fingerprint_of({"noisy": self.clean.fingerprint, "settings": settings, "version": _VERSION})

    def documents(self, reject: Reject | None = None) -> Iterator[Document]:
        """The clean documents."""
        return self.clean.documents(reject)

    def corrupt(self, document: Document) -> Corrupted:
        """A training document with its noise."""
        settings, text = self.settings, document.text
        keys = key("noise", settings.noise_seed, document.id)
        if uniform(keys, 1)[0, 0] < settings.shuffled:
            return _shuffled(text, key("noise words", settings.noise_seed, document.id))
        spans = key("noise spans", settings.noise_seed, document.id)
        random_n = _random_places(len(text), settings.random_spans, settings.span, spans)
        return _damaged(text, random_n, settings.scanned, key("noise scan", settings.noise_seed, document.id))


def _shuffled(text: str, keys: Keys) -> Corrupted:
    """Words in random order between the same spaces; every character is noise, unless the order came out as it was."""
    pieces = re.split(r"(\s+)", text)
    order = np.argsort(words(keys, len(pieces[::2]))[0], kind="stable")
    pieces[::2] = [pieces[::2][place] for place in order]
    mixed = "".join(pieces)
    return Corrupted(mixed, np.full(len(mixed), mixed != text))


def _random_places(length: int, share: float, span: int, keys: Keys) -> NDArray[np.bool_]:
    """Runs of characters that cover about `share` of a text: blocks of `span` characters drawn with that probability."""
    drawn = uniform(keys, -(-length // span))[0] < share
    return np.repeat(drawn, span)[:length]


def _damaged(text: str, random_n: NDArray[np.bool_], share: float, keys: Keys) -> Corrupted:
    """Random characters where `random_n` says so, and scanning damage elsewhere."""
    draws = uniform(keys, 2 * len(text))[0]
    hit_n, how_n = draws[: len(text)] < share, draws[len(text) :]
    pieces: list[str] = []
    flags: list[bool] = []
    gap = False  # a character was left out before this one
    for at, character in enumerate(text):
        piece, noise = character, bool(random_n[at])
        if noise:
            piece = _PRINTABLE[int(how_n[at] * len(_PRINTABLE))]
        elif hit_n[at] and not character.isspace():
            piece = _scanned(character, float(how_n[at]))
            noise = piece != character
        pieces.append(piece)
        flags += [noise or (gap and not place) for place in range(len(piece))]
        gap = not piece
    changed = "".join(pieces)
    return (
        Corrupted(changed, np.asarray(flags, dtype=np.bool_)) if changed else Corrupted(text, np.zeros(len(text), bool))
    )


def _scanned(character: str, how: float) -> str:
    """What a scanner may read in place of a character."""
    if character in _ALIKE:
        return _ALIKE[character]
    other = character.swapcase()
    if other != character and len(other) == 1 and how < 0.5:
        return other
    return character * 2 if how < 0.75 else ""


def token_spans(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the characters of each; raises ConfigError where the tokenizer cannot tell."""
    spans = getattr(tokenizer, "spans", None)
    if spans is None:
        raise ConfigError(
            f"noise is flagged by character, and the tokenizer {type(tokenizer).__name__} does not say which characters its "
            "tokens come from; use the tokenizer bytes, bpe or huggingface with corpus: noisy."
        )
    ids, found = spans(text)
    return ids, found


def token_noise(spans: list[tuple[int, int]], noise: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which tokens hold a flagged character, from the characters of each token."""
    before = np.concatenate([[0], np.cumsum(noise)])
    found: NDArray[np.bool_] = np.asarray([before[stop] > before[start] for start, stop in spans], dtype=np.bool_)
    return found
