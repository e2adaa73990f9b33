"""Append-only JSON lines: a store that a crash can only cut short, never change.

Each record is one `write` to a file opened for appending, so that records of several processes do not mix. A last line
without its newline was torn by a crash; it is reported and ignored, and the next record starts on a line of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        """Add one record. Raises OSError if the disk is full; earlier records are untouched."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            if self._torn():
                line = b"\n" + line
            while line:
                line = line[os.write(descriptor, line) :]
            if self._durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _torn(self) -> bool:
        """True if the file ends in the middle of a line."""
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def read(self) -> Reading:
        """All records, and warnings for what is torn or foreign. A missing file is an empty journal."""
        if not self.path.exists():
            return Reading((), ())
        records, warnings = [], []
        content = self.path.read_bytes()
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                warnings.append(f"{self.path}:{number}: not a record ({len(line)} bytes), ignored")
        return Reading(tuple(records), tuple(warnings))
