"""A loss store: what a reference model loses on each target of a data source, computed once and read by every run.

    STORE/header.json          which data, which tokenizer, which reference, and the layout; written first
          block-00000000       losses of consecutive windows, then the hash of these bytes
          manifest.json        the header again with every block's hash; written last: the store is complete

A row is a window of the source (`TextSource.window`), numbered in the order of the text. Seeds and epochs shuffle these
numbers and nothing else, so that one row serves every run on the same data.

Blocks are written whole or not at all, and each depends on its own windows alone. A write that was cut short goes on with
the blocks that are missing; the result equals that of an uninterrupted one byte for byte. A reference is the same if its weights
are, wherever it is: the header keeps the name that it was first given by, and the store's fingerprint leaves it out. Damage is
found by hash, at the first read of a block, and scoring again replaces what is damaged.

Rounding: float16 keeps 11 significant bits, so that a loss between 2 and 4 nats is off by at most 0.001 and one between 8 and 16
by at most 0.004. float32 keeps the reference's own number.

Shapes: n windows · t targets of a window · r windows of a block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from torchstone.errors import ConfigError, DataError
from torchstone.storage.atomic import atomic_write
from torchstone.storage.hashing import bytes_hash, fingerprint_of

FORMAT = 1
HEADER, MANIFEST = "header.json", "manifest.json"
Precision = Literal["float16", "float32"]
STORED: dict[str, str] = {"float16": "<f2", "float32": "<f4"}
_DIGEST = 32  # hexadecimal digits at the end of a block


@dataclass(frozen=True)
class Header:
    """What a store holds.

    Attributes:
        data: fingerprint of the source.
        tokenizer: fingerprint of its tokenizer.
        reference: who made the losses: plain data such as model, step and a hash of the weights.
        windows, length: rows, and targets of each.
        rows: windows of a block; the last block may have fewer.
        dtype: of the stored losses.
    """

    data: str
    tokenizer: str
    reference: Mapping[str, Any]
    windows: int
    length: int
    rows: int
    dtype: Precision

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.windows // self.rows)

    def span(self, block: int) -> range:
        """Windows of a block."""
        return range(block * self.rows, min((block + 1) * self.rows, self.windows))

    def data_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"format": FORMAT, **asdict(self), "reference": dict(self.reference)}


def write_block(path: Path, losses: NDArray[Any]) -> str:
    """Store an array's bytes and their hash in one step; returns the hash."""
    data = np.ascontiguousarray(losses).tobytes()
    digest = bytes_hash(data)
    atomic_write(path, data + digest.encode())
    return digest


def read_block(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[Any] | None:
    """What `write_block` stored; None where the file is missing, has another size, or is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data, digest = content[:-_DIGEST], content[-_DIGEST:]
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if len(data) != expected or bytes_hash(data).encode() != digest:
        return None
    return np.frombuffer(data, dtype=dtype).reshape(shape)


class LossStoreWriter:
    """Fills a store block by block.

    Args:
        path: its folder; made if it does not exist.
        header: what it will hold.

    Raises:
        DataError: the folder holds the store of something else, or files that are no store.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = Path(path), header
        there = self.path / HEADER
        if there.exists():
            stored = read_header(self.path)
            _same(self.path, stored, header)
            self.header = stored  # the reference may be given by another name now
        elif self.path.exists() and any(self.path.iterdir()):
            raise DataError(f"{self.path} holds files that are no loss store; choose another folder.")
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            atomic_write(there, json.dumps(header.data_dict(), indent=1))

    def missing(self) -> list[int]:
        """Blocks that are not there or are damaged; every block is read once."""
        header = self.header
        wanted = ((block, (len(header.span(block)), header.length)) for block in range(header.blocks))
        dtype = STORED[header.dtype]
        return [block for block, shape in wanted if read_block(block_path(self.path, block), shape, dtype) is None]

    def write(self, block: int, losses_rt: NDArray[np.float32]) -> None:
        """Store one block.

        Raises:
            DataError: a loss that is not finite, named by window and target, or too large for the store's type.
        """
        span = self.header.span(block)
        assert losses_rt.shape == (len(span), self.header.length), losses_rt.shape
        with np.errstate(over="ignore"):
            stored_rt = losses_rt.astype(STORED[self.header.dtype])
        bad = np.argwhere(~np.isfinite(stored_rt))
        if len(bad):
            row, target = map(int, bad[0])
            raise DataError(
                f"the reference's loss at target {target} of window {span[row]} is {losses_rt[row, target]}, which a store of "
                f"{self.header.dtype} cannot hold. Look for damaged weights in the reference, or score in float32."
            )
        write_block(block_path(self.path, block), stored_rt)

    def finish(self) -> LossStore:
        """Write the manifest once all blocks are there; returns the store."""
        hashes = [_stored_hash(block_path(self.path, block)) for block in range(self.header.blocks)]
        content = {**self.header.data_dict(), "blocks": hashes}
        atomic_write(self.path / MANIFEST, json.dumps({**content, "hash": _content_hash(content)}, indent=1))
        return LossStore(self.path)


class LossStore:
    """A complete store, open for reading.

    Raises:
        DataError: there is none, it is not complete, or its manifest is damaged.

    Attributes:
        header: what it holds.
        fingerprint: of the content.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        manifest = self.path / MANIFEST
        if not manifest.exists():
            done = sum(block_path(self.path, block).exists() for block in range(self.header.blocks))
            raise DataError(
                f"the loss store {self.path} is not complete: {done} of {self.header.blocks} blocks are there. Run the "
                "`torchstone score data` command that began it again; it continues."
            )
        content = _json(manifest)
        stored = content.pop("hash", None)
        expected = {**self.header.data_dict(), "blocks": content.get("blocks")}
        if content != expected or _content_hash(content) != stored:
            raise _damaged(self.path, f"{MANIFEST} does not have the content that was written")
        self._hashes: list[str] = content["blocks"]
        self._verified: set[int] = set()
        self.fingerprint = str(stored)

    def losses(self, windows_n: NDArray[np.int64]) -> NDArray[np.float32]:
        """Losses [n, t] of windows by number, fp32; raises DataError where a block is damaged."""
        found_nt = np.empty((len(windows_n), self.header.length), dtype=np.float32)
        blocks_n = windows_n // self.header.rows
        for block in np.unique(blocks_n).tolist():
            here_n = np.flatnonzero(blocks_n == block)
            found_nt[here_n] = self._rows(block, (windows_n[here_n] - block * self.header.rows).tolist())
        return found_nt

    def verify(self) -> None:
        """Read every block; raises DataError naming the first that is damaged."""
        for block in range(self.header.blocks):
            self._verify(block)

    def _rows(self, block: int, rows: list[int]) -> NDArray[Any]:
        """Rows of a block, whose hash is checked when it is first used. No file stays open."""
        if block not in self._verified:
            self._verify(block)
            self._verified.add(block)
        path, dtype, length = block_path(self.path, block), np.dtype(STORED[self.header.dtype]), self.header.length
        size = length * dtype.itemsize
        content = bytearray()
        try:
            with open(path, "rb") as file:
                for row in rows:
                    file.seek(row * size)
                    content += file.read(size)
        except OSError as error:
            raise _damaged(self.path, f"{path.name}: {error}") from error
        if len(content) != len(rows) * size:
            raise _damaged(self.path, f"{path.name} is shorter than when it was opened")
        return np.frombuffer(content, dtype=dtype).reshape(len(rows), length)

    def _verify(self, block: int) -> None:
        """Read a whole block; raises DataError unless it is what was written."""
        shape = (len(self.header.span(block)), self.header.length)
        path = block_path(self.path, block)
        if read_block(path, shape, STORED[self.header.dtype]) is None or _stored_hash(path) != self._hashes[block]:
            raise _damaged(self.path, f"{path.name} does not have the content that was written")


def block_path(path: Path, block: int) -> Path:
    """Where a block is."""
    return path / f"block-{block:08d}"


def read_header(path: Path) -> Header:
    """The header of a store, complete or not; raises DataError where there is none that can be read."""
    if not (path / HEADER).is_file():
        raise DataError(
            f"{path} is no loss store (it has no {HEADER}); make one with `torchstone score data RECIPE --reference MODEL "
            f"--store {path}`."
        )
    content = _json(path / HEADER)
    try:
        if content.pop("format") != FORMAT:
            raise DataError(f"the loss store {path} has another format than {FORMAT}; score again into another folder.")
        header = Header(**content)
    except (KeyError, TypeError) as error:
        raise _damaged(path, f"{HEADER}: {error}") from error
    wrong = [
        *(name for name in ("data", "tokenizer") if not isinstance(getattr(header, name), str)),
        *(name for name in ("windows", "length", "rows") if not _is_count(getattr(header, name))),
        *(["reference"] if not isinstance(header.reference, dict) else []),
        *(["dtype"] if header.dtype not in get_args(Precision) else []),
    ]
    if wrong:
        raise _damaged(path, f"{HEADER}: {wrong[0]} is {getattr(header, wrong[0])!r}")
    return header


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _content_hash(content: Mapping[str, Any]) -> str:
    """Hash of a manifest without the name by which the reference was given."""
    reference = {name: value for name, value in content["reference"].items() if name != "model"}
    return fingerprint_of({**content, "reference": reference})


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name}: {error}") from error
    if not isinstance(found, dict):
        raise _damaged(path.parent, f"{path.name} holds no object")
    return found


def _stored_hash(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(-_DIGEST, 2)
        return file.read().decode("ascii", "replace")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"the loss store {path} is damaged: {reason}. Run the `torchstone score data` command that made it again; it replaces "
        "damaged blocks. A damaged header or manifest has to be deleted first."
    )


def _same(path: Path, there: Header, wanted: Header) -> None:
    """Raise ConfigError naming the first thing in which a store differs from what is to be written."""
    for name, value in wanted.data_dict().items():
        found = there.data_dict()[name]
        if name == "reference":  # its weights decide, not the path that it was given by
            found, value = found.get("weights", found), value.get("weights", value)
        if found != value:
            raise ConfigError(
                f"{path} holds the losses of another {_WORDS.get(name, name)}: {found} there, {value} now. Choose "
                "another --store, or delete that folder."
            )


_WORDS = {
    "rows": "layout (windows of a block)",
    "dtype": "precision",
    "data": "data source",
    "reference": "reference (hash of weights)",
}
