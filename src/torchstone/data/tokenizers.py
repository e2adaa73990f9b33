"""Tokenizers: bytes, byte-pair encoding trained on the corpus itself, and a Hugging Face `tokenizer.json`.

All three are lossless on any text or say so. The id that ends a document is never the encoding of text: text
that spells a special token, such as `<|endoftext|>`, is encoded as ordinary characters.

Byte-pair encoding (Sennrich et al., 2016; on bytes as in GPT-2) merges the most frequent pair of neighbouring
tokens, again and again, until the vocabulary is full. It is trained once per corpus and setting and kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import tokenizers as hf
from pydantic import Field

from torchstone.data.corpus import Document
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import DataError
from torchstone.recipe.part import Part
from torchstone.storage.atomic import atomic_write
from torchstone.storage.hashing import bytes_hash, fingerprint_of

Documents = Callable[[], Iterable[Document]]
_FORMAT = 1  # raised when the same settings and corpus give another tokenizer
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class BytesConfig(Part):
    """UTF-8 bytes: 256 ids and one that ends a document."""

    family: ClassVar[str] = "tokenizer"
    kind: Literal["bytes"] = "bytes"

    def vocabulary(self) -> int:
        """Number of token ids."""
        return 257

    def build(self, documents: Documents, corpus: str, cache: Path) -> Tokenizer:
        """The tokenizer; needs neither corpus nor cache."""
        return ByteTokenizer()


class BPEConfig(Part):
    """Byte-pair encoding on bytes, trained on a fixed sample of the training documents."""

    family: ClassVar[str] = "tokenizer"
    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=1024, ge=258, le=1_000_000, description="ids, the end of a document included")
    sample_bytes: int = Field(default=4_000_000, gt=0, description="bytes of training text that merges are counted on")

    def vocabulary(self) -> int:
        """Number of token ids. A tiny corpus may leave the last ones unused."""
        return self.vocab_size

    def build(self, documents: Documents, corpus: str, cache: Path) -> Tokenizer:
        """The tokenizer, from the cache or trained now.

        Args:
            documents: gives the training documents; called only if nothing is cached.
            corpus: fingerprint of what `documents` gives.
            cache: folder in which the trained tokenizer is kept.
        """
        name = fingerprint_of({"bpe": self.model_dump(mode="json"), "corpus": corpus, "format": _FORMAT})
        path = cache / "tokenizers" / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, _train(sample(documents(), self.sample_bytes), self.vocab_size))
        return FileTokenizer(path, vocab_size=self.vocab_size, end_of_document=self.vocab_size - 1)


class HuggingFaceTokenizerConfig(Part):
    """A `tokenizer.json` as the tokenizers library writes it. Read as data; no code of others is run."""

    family: ClassVar[str] = "tokenizer"
    kind: Literal["huggingface"] = "huggingface"
    path: str = Field(description="a tokenizer.json, or the folder that holds one")
    end_of_document: str | None = Field(
        default=None, description="special token that ends a document; null: the usual names are tried"
    )

    def vocabulary(self) -> int:
        """Number of token ids; reads the file."""
        return self._load().vocab_size

    def build(self, documents: Documents, corpus: str, cache: Path) -> Tokenizer:
        """The tokenizer; needs neither corpus nor cache. Raises DataError if the file cannot be used."""
        return self._load()

    def _load(self) -> FileTokenizer:
        path = Path(self.path)
        file = path / "tokenizer.json" if path.is_dir() else path
        return FileTokenizer(file, end_name=self.end_of_document)


class ByteTokenizer:
    """UTF-8 bytes; bytes that form no character decode to U+FFFD, ids that are no byte to nothing."""

    vocab_size = 257
    end_of_document = 256
    fingerprint = fingerprint_of("utf-8 bytes")

    def encode(self, text: str) -> list[int]:
        """Bytes of the text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Bytes of each text."""
        return [self.encode(text) for text in texts]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters start … stop-1 of the text that it comes from."""
        return self.encode(text), [(at, at + 1) for at, character in enumerate(text) for _ in character.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the bytes."""
        return bytes(token for token in tokens if 0 <= token < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer of the tokenizers library.

    Args:
        path: its JSON file.
        vocab_size: number of ids; None: the file's.
        end_of_document: id that ends a document; None: the special token `end_name`.
        end_name: name of that token; None: the first of the usual names that the file has.

    Raises:
        DataError: the file is missing, damaged, or has no token that ends a document.
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int | None = None,
        end_of_document: int | None = None,
        end_name: str | None = None,
    ) -> None:
        try:
            content = path.read_bytes()
            self._inner = hf.Tokenizer.from_str(content.decode())
        except OSError as error:
            raise DataError(f"the tokenizer file {path} cannot be read: {error.strerror}.") from error
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"{path} is not a tokenizer.json of the tokenizers library ({error}); give the path of "
                "one, or remove a damaged file."
            ) from error
        self._inner.encode_special_tokens = True  # text that spells a special token stays text
        self._inner.no_truncation()
        self._inner.no_padding()
        highest = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_size = highest + 1 if vocab_size is None else vocab_size
        if end_of_document is None:
            end_of_document = _end_id(self._inner, path, end_name)
        self.end_of_document = end_of_document
        self._content = content

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file and of the id that ends a document."""
        return fingerprint_of([bytes_hash(self._content), self.vocab_size, self.end_of_document])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; uses all cores."""
        return [item.ids for item in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters start … stop-1 of the text that it comes from."""
        found = self._inner.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; ids without text give nothing."""
        known = [token for token in tokens if 0 <= token < self.vocab_size and token != self.end_of_document]
        return self._inner.decode(known, skip_special_tokens=False)


def sample(documents: Iterable[Document], size: int) -> Iterator[str]:
    """Texts of about `size` bytes: the documents whose ids have the smallest hashes, smallest first.

    The choice depends on the ids alone, not on the order of the documents; at most `size` bytes and one
    document are held. A document longer than `size` is cut.
    """
    kept: list[tuple[int, str]] = []
    total = 0
    for document in documents:
        rank = int(bytes_hash(document.id.encode("utf-8", "surrogatepass")), 16)
        text = document.text.encode()[:size].decode(errors="ignore")
        heapq.heappush(kept, (-rank, text))
        total += len(text.encode())
        while len(kept) > 1 and total - len(kept[0][1].encode()) >= size:
            total -= len(heapq.heappop(kept)[1].encode())
    return (text for _, text in sorted(kept, reverse=True))


def _train(texts: Iterable[str], vocab_size: int) -> str:
    """JSON of a byte-level BPE whose last id stays free for the end of a document."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=False,
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _end_id(tokenizer: hf.Tokenizer, path: Path, name: str | None) -> int:
    for candidate in _ENDS if name is None else (name,):
        if (found := tokenizer.token_to_id(candidate)) is not None:
            return found
    tried = "none of " + ", ".join(_ENDS) if name is None else f"no {name!r}"
    raise DataError(f"{path} has {tried} to end a document; name its token: data.tokenizer.end_of_document=TOKEN.")
