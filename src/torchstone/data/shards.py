"""Token shards: a tokenised corpus on disk, built once, mapped into memory, never changed.

A folder holds, for each of `train` and `validation`:

    train.tokens            uint16 or uint32: all documents, each closed by the end-of-document id
    train.ends              int64: where each document ends (its closing id included)
    train.documents.jsonl   id and location of each document
    train.noise             one byte a token, 1 where it is injected noise; only where the corpus injects some

`manifest.json` holds sizes and hashes, its own included, and `quarantine.jsonl` the rows that were left out,
if any. The folder appears whole or not at all; two processes that build at once both succeed, and one's work
is kept. Opening checks the manifest's hash and all sizes; `verify` reads every file and checks its hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from torchstone.data.building import Advance, progress, report_skipped
from torchstone.data.corpus import Corpus, Document, Rejected
from torchstone.data.noisy import NoisyCorpus, token_noise, token_spans
from torchstone.data.split import split
from torchstone.data.tokenizer import Tokenizer
from torchstone.errors import DataError
from torchstone.storage.atomic import atomic_directory
from torchstone.storage.hashing import file_hash, fingerprint_of

FORMAT = 2
SPLITS = ("train", "validation")
_QUARANTINE = "quarantine.jsonl"
_GROUP = 1 << 20  # characters that are tokenised together


@dataclass(frozen=True)
class Shard:
    """One side of the split, mapped into memory.

    Attributes:
        folder, name: where it is; `train` or `validation`.
        tokens: all token ids.
        ends: where each document ends in `tokens`.
        text_bytes: UTF-8 bytes of the documents' text.
        vocab_size: ids are below it.
        noise: one number a token, 1 where it is injected noise; None where the corpus injects none.
    """

    folder: Path
    name: str
    tokens: NDArray[np.unsignedinteger[Any]]
    ends: NDArray[np.int64]
    text_bytes: int
    vocab_size: int
    noise: NDArray[np.uint8] | None = None

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start … stop-1; raises DataError if one is no id of the vocabulary."""
        tokens = self.tokens[start:stop].astype(np.int64)
        if tokens.size and tokens.max() >= self.vocab_size:
            raise DataError(
                f"{self.folder / self.name}.tokens holds the id {tokens.max()} between {start} and {stop}, "
                f"but the vocabulary has {self.vocab_size} ids; the file is damaged. Delete {self.folder} to "
                "build it again."
            )
        return tokens

    def first_document(self, position: int) -> int:
        """Number of the document that holds the token at `position`."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def labels(self) -> list[tuple[str, str]]:
        """Id and location of every document."""
        with open(self.folder / f"{self.name}.documents.jsonl", encoding="utf-8") as file:
            return [(row[0], row[1]) for row in map(json.loads, file)]


@dataclass(frozen=True)
class Shards:
    """A tokenised corpus.

    Attributes:
        fingerprint: of the content of all files.
        kept, rejected: rows that became documents, and rows that were left out.
    """

    folder: Path
    fingerprint: str
    train: Shard
    validation: Shard
    kept: int
    rejected: int

    def quarantine(self) -> list[Rejected]:
        """The rows that were left out."""
        path = self.folder / _QUARANTINE
        if not path.exists():
            return []
        return [Rejected(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def open_or_build(corpus: Corpus, tokenizer: Tokenizer, fraction: float, cache: Path) -> Shards:
    """The shards of a corpus, from the cache or built now.

    Args:
        fraction: share of the documents that is held out.
        cache: folder of all built data.

    Raises:
        DataError: the corpus cannot be read, or a cached folder is damaged.
    """
    source = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "validation": fraction}
    folder = cache / "shards" / fingerprint_of({**source, "format": FORMAT})
    if not folder.exists():
        try:
            with atomic_directory(folder) as partial:
                _build(partial, corpus, tokenizer, fraction, source)
        except OSError as error:
            if not folder.exists():  # else another process was first, with the same content
                raise DataError(f"the tokenised corpus cannot be stored in {folder}: {error}.") from error
        shards = open_shards(folder)
        if shards.rejected:
            report_skipped(shards.kept, shards.rejected, str(folder / _QUARANTINE))
        return shards
    return open_shards(folder)


def open_shards(folder: Path) -> Shards:
    """Map a built folder into memory; raises DataError if a file is missing or has another size."""
    manifest = _manifest(folder)
    for name, stored in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read: {error.strerror}") from error
        if size != stored["size"]:
            raise _damaged(folder, f"{name} has {size} bytes instead of {stored['size']}")
    train, validation = (_open_shard(folder, name, manifest) for name in SPLITS)
    rows = manifest["rows"]
    return Shards(folder, fingerprint_of(manifest), train, validation, rows["kept"], rows["rejected"])


def verify(shards: Shards) -> None:
    """Read every file again and compare its hash; raises DataError naming the first that differs."""
    for name, stored in _manifest(shards.folder)["files"].items():
        if file_hash(shards.folder / name) != stored["hash"]:
            raise _damaged(shards.folder, f"{name} does not have the content that was written")


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest without its own hash, which is checked."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        stored = manifest.pop("hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"manifest.json: {error}") from error
    if fingerprint_of(manifest) != stored:
        raise _damaged(folder, "manifest.json does not have the content that was written")
    return manifest


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"the tokenised corpus in {folder} is damaged: {reason}. Delete the folder to build it again.")


def _open_shard(folder: Path, name: str, manifest: dict[str, Any]) -> Shard:
    about = manifest["splits"][name]
    tokens = _map(folder / f"{name}.tokens", manifest["dtype"])
    ends = _map(folder / f"{name}.ends", "<i8")
    noise = _map(folder / f"{name}.noise", "u1") if f"{name}.noise" in manifest["files"] else None
    return Shard(folder, name, tokens, ends, about["text_bytes"], manifest["vocab_size"], noise)


def _map(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class _Writer:
    """Appends tokenised documents to the files of one split; `stack` closes them."""

    def __init__(self, stack: ExitStack, folder: Path, name: str, dtype: str, flagged: bool) -> None:
        def opened(part: str) -> BinaryIO:
            return stack.enter_context(open(folder / f"{name}.{part}", "wb"))

        self.tokens, self.ends, self.labels = map(opened, ("tokens", "ends", "documents.jsonl"))
        self.noise = opened("noise") if flagged else None
        self.dtype = dtype
        self.count = 0
        self.documents = 0
        self.text_bytes = 0

    def add(self, document: Document, ids: list[int], end: int, noise: NDArray[np.bool_] | None = None) -> None:
        """Append one document and the id that ends it, which is never noise."""
        if self.noise is not None and noise is not None:
            self.noise.write(np.append(noise, False).astype("u1").tobytes())
        self.tokens.write(np.asarray([*ids, end], dtype=self.dtype).tobytes())
        self.count += len(ids) + 1
        self.documents += 1
        self.text_bytes += len(document.text.encode())
        self.ends.write(np.asarray([self.count], dtype="<i8").tobytes())
        self.labels.write(json.dumps([document.id, document.location]).encode() + b"\n")


class _Reading:
    """Reads a corpus and counts what is kept and what is left out."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.kept = 0
        self.rejected: list[Rejected] = []

    def documents(self) -> Iterator[Document]:
        """All documents."""
        for document in self._corpus.documents(self.rejected.append):
            self.kept += 1
            yield document


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer, fraction: float, source: dict[str, Any]) -> None:
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    reading = _Reading(corpus)
    noisy = corpus if isinstance(corpus, NoisyCorpus) else None
    with ExitStack() as stack, progress("tokenising the corpus") as advance:
        writers = {
            name: _Writer(stack, folder, name, dtype, flagged=noisy is not None and name == "train") for name in SPLITS
        }
        _tokenise(split(reading.documents(), fraction), tokenizer, writers, advance, noisy)
    if reading.rejected:
        lines = [json.dumps(vars(item)) + "\n" for item in reading.rejected]
        (folder / _QUARANTINE).write_text("".join(lines), encoding="utf-8")
    written = {path.name: {"size": path.stat().st_size, "hash": file_hash(path)} for path in sorted(folder.iterdir())}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "source": source,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "splits": {
            name: {"tokens": writer.count, "documents": writer.documents, "text_bytes": writer.text_bytes}
            for name, writer in writers.items()
        },
        "rows": {"kept": reading.kept, "rejected": len(reading.rejected)},
        "files": written,
    }
    manifest["hash"] = fingerprint_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _tokenise(
    documents: Iterable[tuple[Document, bool]],
    tokenizer: Tokenizer,
    writers: dict[str, _Writer],
    advance: Advance,
    noisy: NoisyCorpus | None,
) -> None:
    for group in _groups(documents):
        for document, held, ids, noise in _encoded(group, tokenizer, noisy):
            if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
                raise DataError(
                    f"{document.location}: the tokenizer gives ids from {min(ids)} to {max(ids)}, outside "
                    f"its vocabulary of {tokenizer.vocab_size}; use the tokenizer.json that belongs together."
                )
            writers[SPLITS[held]].add(document, ids, tokenizer.end_of_document, noise)
        done = writers.values()
        advance(sum(writer.documents for writer in done), sum(writer.count for writer in done))


Encoded = tuple[Document, bool, list[int], NDArray[np.bool_] | None]


def _encoded(group: list[tuple[Document, bool]], tokenizer: Tokenizer, noisy: NoisyCorpus | None) -> Iterator[Encoded]:
    """Each document with its side, ids and flags; training documents with their noise."""
    if noisy is None:
        encoded = tokenizer.encode_batch([document.text for document, _ in group])
        yield from ((document, held, ids, None) for (document, held), ids in zip(group, encoded, strict=True))
        return
    for document, held in group:
        if held:
            yield document, held, tokenizer.encode(document.text), None
            continue
        corrupted = noisy.corrupt(document)
        ids, spans = token_spans(tokenizer, corrupted.text)
        changed = Document(document.id, document.location, corrupted.text)
        yield changed, held, ids, token_noise(spans, corrupted.noise)


def _groups(documents: Iterable[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    """Consecutive documents, up to about `_GROUP` characters together."""
    group: list[tuple[Document, bool]] = []
    size = 0
    for item in documents:
        group.append(item)
        size += len(item[0].text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
