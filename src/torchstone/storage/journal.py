"""Append-only JSON lines: a store that a crash can only cut short, never change.

Each record is one `write` to a file opened for appending, so that records of several processes do not mix.
A last line without its newline was torn by a crash; it is reported and ignored, and the next record starts
on a line of its own. Lines that are no record (binary garbage, a foreign text) are reported and ignored
alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchstone.storage.atomic import naming


@dataclass(frozen=True)
class Reading:
    """What a journal holds: its records in order, and one warning for every line that is no record."""

    records: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


class Journal:
    """One append-only file of JSON objects.

    Args:
        path: the file; made with the first record.
        durable: flush every record to the disk before `append` returns.
    """

    def __init__(self, path: str | Path, *, durable: bool = False) -> None:
        self.path = Path(path)
        self._durable = durable

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record.

        Raises:
            OSError: with the file's name, if the disk is full; earlier records are untouched.
            TypeError, ValueError: the record is no plain data, or holds a number that is not finite.
        """
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = text.encode() + b"\n"
        with naming(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if _torn(descriptor):
                    line = b"\n" + line
                while line:  # one write, unless the disk is full: then the next one says so
                    line = line[os.write(descriptor, line) :]
                if self._durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read(self) -> Reading:
        """All records, and warnings for what is torn or foreign. A missing file is an empty journal."""
        if not self.path.exists():
            return Reading((), ())
        records: list[dict[str, Any]] = []
        warnings: list[str] = []
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            record = _record(line)
            if record is not None:
                records.append(record)
            elif line.strip():
                what = "torn by a crash" if number == len(lines) else "not a record"
                warnings.append(f"{self.path}:{number}: {what} ({len(line)} bytes), ignored")
        return Reading(tuple(records), tuple(warnings))


def _record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _torn(descriptor: int) -> bool:
    """True if the file ends in the middle of a line."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
