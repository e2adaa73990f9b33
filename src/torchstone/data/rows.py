"""Rows of text files: plain text, JSON lines (also compressed), Parquet; with a reason for each that is bad.

    .txt                            one row: the whole file
    .jsonl  .jsonl.gz  .jsonl.zst   one row a line: an object whose text field is a string
    .parquet                        one row a row; numbered from 1

Text is UTF-8. A byte-order mark at the start of a file is dropped. A line may end in LF or CRLF; in plain
text CRLF becomes LF, inside a JSON string it stays. Blank lines of JSON lines hold no row. A row is bad that
is not valid UTF-8 or JSON, lacks its text field, has another type there, is empty or blank, holds a NUL
character or a lone surrogate, or is longer than the limit; a file without any row is one bad row.

A damaged container (a torn gzip stream, a broken Parquet file) is an error of the whole file and never
skipped.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from torchstone.errors import DataError, DependencyError

_EXCERPT = 80
_SHOWN = 40  # fields of a row that are named, and characters of each
_MARK = b"\xef\xbb\xbf"  # byte-order mark


@dataclass(frozen=True)
class Row:
    """One row: its text, or the reason why it has none.

    Attributes:
        line: line of the file (row of a Parquet file), from 1.
        text: the text; empty if the row is bad.
        id: the row's own `id` field, if it has one.
        reason: why the row is bad; empty if it is good.
        excerpt: first characters of a bad row.
    """

    line: int
    text: str = ""
    id: str | None = None
    reason: str = ""
    excerpt: str = ""


@dataclass(frozen=True)
class Format:
    """How rows are read: the field that holds the text, and the longest line in bytes."""

    text_field: str
    max_line_bytes: int


def reader_of(name: str) -> Callable[[BinaryIO, str, Format], Iterator[Row]]:
    """The reader for a file name.

    Raises:
        DataError: the ending is not known.
        DependencyError: the format needs a package that is not installed.
    """
    for ending, reader in _READERS.items():
        if name.lower().endswith(ending):
            if package := _PACKAGES.get(ending):
                _require(package, name)
            return reader
    raise DataError(f"{name}: the ending is not one of {', '.join(_READERS)}; rename or convert the file.")


def _plain(file: BinaryIO, location: str, form: Format) -> Iterator[Row]:
    """The whole file as one row."""
    parts = []
    for number, raw in _lines(file, form.max_line_bytes):
        if isinstance(raw, int):
            yield _too_long(number, raw, form)
            return
        text, reason = _decode(raw)
        if reason := reason or _has_nul(text):
            yield _bad(number, reason, raw)
            return
        parts.append(text)
    whole = "".join(parts).replace("\r\n", "\n")
    if whole.strip():
        yield Row(1, whole)
    else:
        yield Row(1, reason="the text is empty" if whole else "the file is empty")


def _json_lines(file: BinaryIO, location: str, form: Format) -> Iterator[Row]:
    """One row a line."""
    number = rows = 0
    for number, raw in _lines(file, form.max_line_bytes):
        if isinstance(raw, int):
            yield _too_long(number, raw, form)
        elif raw.strip():
            yield _json_row(number, raw, form.text_field)
        else:
            continue
        rows += 1
    if rows == 0:
        yield Row(1, reason="the file holds only blank lines" if number else "the file is empty")


def _gzip(file: BinaryIO, location: str, form: Format) -> Iterator[Row]:
    with gzip.GzipFile(fileobj=file) as inner:
        yield from _compressed(inner, location, form, (EOFError, OSError, zlib.error))


def _zstandard(file: BinaryIO, location: str, form: Format) -> Iterator[Row]:
    import zstandard

    from torchstone.data.zstd import open_zstandard

    yield from _compressed(open_zstandard(file), location, form, (zstandard.ZstdError, EOFError))


def _compressed(inner: Any, location: str, form: Format, damage: tuple[type[Exception], ...]) -> Iterator[Row]:
    line = 0
    try:
        for row in _json_lines(inner, location, form):
            line = row.line
            yield row
    except damage as error:
        raise DataError(f"{location}: the compressed file is damaged after line {line}: {error}.") from error


def _parquet(file: BinaryIO, location: str, form: Format) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if form.text_field not in names:
            raise DataError(f"{location} has no column {form.text_field!r}; its columns: {', '.join(names)}.")
        wanted = [form.text_field, *(["id"] if "id" in names and form.text_field != "id" else [])]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            columns = [batch.column(name) for name in wanted]
            for cells in zip(*columns, strict=True):
                number += 1
                yield _parquet_row(number, form, *cells)
        if number == 0:
            yield Row(1, reason="the file has no rows")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{location} is not a readable Parquet file: {error}.") from error


_PACKAGES = {".jsonl.zst": "zstandard", ".parquet": "pyarrow"}


def _require(package: str, location: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise DependencyError(f"{location} needs {package}; run: pip install 'torchstone[data]'") from error


_READERS: dict[str, Callable[[BinaryIO, str, Format], Iterator[Row]]] = {
    ".txt": _plain,
    ".jsonl": _json_lines,
    ".jsonl.gz": _gzip,
    ".jsonl.zst": _zstandard,
    ".parquet": _parquet,
}


def _lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes | int]]:
    """Number and bytes of each line, or its length if above `limit`; at most `limit` bytes are held."""
    number = 0
    while raw := file.readline(limit + len(_MARK) + 2):  # the longest line with its mark and its CRLF
        number += 1
        if number == 1:
            raw = raw.removeprefix(_MARK)
        size = _length(raw)
        if size <= limit:
            yield number, raw
            continue
        while not raw.endswith(b"\n") and (raw := file.readline(limit)):
            size += _length(raw)
        yield number, size


def _length(raw: bytes) -> int:
    """Bytes of a line without its ending, which is LF or CRLF; of an unfinished line, all bytes."""
    return len(raw[:-1].removesuffix(b"\r")) if raw.endswith(b"\n") else len(raw)


def _json_row(number: int, raw: bytes, text_field: str) -> Row:
    line, reason = _decode(raw)
    if reason:
        return _bad(number, reason, raw)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _bad(number, f"invalid JSON: {error}", raw)
    if not isinstance(value, dict):
        return _bad(number, f"{_type(value)} instead of an object", raw)
    if text_field not in value:
        fields = ", ".join(name[:_SHOWN] for name in list(value)[:_SHOWN]) or "none"
        return _bad(number, f"no field {text_field!r}; it has {len(value)}: {fields}", raw)
    return _checked(number, text_field, value[text_field], value.get("id"), raw)


def _parquet_row(number: int, form: Format, text: Any, id: Any = None) -> Row:
    try:
        value, name = text.as_py(), None if id is None else id.as_py()
    except UnicodeDecodeError as error:
        return _bad(number, f"invalid UTF-8: {error.reason} at byte {error.start}", b"")
    raw = value[:_EXCERPT].encode(errors="replace") if isinstance(value, str) else b""
    row = _checked(number, form.text_field, value, name, raw)
    size = len(row.text.encode())
    return _too_long(number, size, form) if size > form.max_line_bytes else row


def _checked(number: int, text_field: str, text: Any, id: Any, raw: bytes) -> Row:
    if not isinstance(text, str):
        return _bad(number, f"field {text_field!r} is {_type(text)} instead of a string", raw)
    if reason := _unusable(text):
        return _bad(number, reason, raw)
    named = isinstance(id, str | int) and not isinstance(id, bool) and str(id) != ""
    return Row(number, text, str(id) if named else None)


def _decode(raw: bytes) -> tuple[str, str]:
    """Text of bytes, or the reason why there is none."""
    try:
        return raw.decode(), ""
    except UnicodeDecodeError as error:
        return "", f"invalid UTF-8: {error.reason} at byte {error.start}"


def _unusable(text: str) -> str:
    """Why a string cannot be a document; empty if it can."""
    if not text.strip():
        return "the text is empty"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate at character {error.start}"
    return _has_nul(text)


def _has_nul(text: str) -> str:
    at = text.find("\0")
    return "" if at < 0 else f"a NUL character at character {at}"


def _too_long(number: int, size: int, form: Format) -> Row:
    return Row(number, reason=f"the row has {size} bytes, more than max_line_bytes={form.max_line_bytes}")


def _bad(number: int, reason: str, raw: bytes) -> Row:
    return Row(number, reason=reason, excerpt=raw[:_EXCERPT].decode(errors="replace"))


def _type(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a truth value",
        bytes: "binary",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"of type {type(value).__name__}")
