"""Hashes of files and of plain data.

xxh3 with 128 bits: fast (several GB/s) and far beyond chance collisions. It guards against damage, not
against a forger.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

_CHUNK = 1 << 20


def file_hash(path: str | Path) -> str:
    """32 hexadecimal digits of a file's content, read in pieces."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def bytes_hash(data: bytes) -> str:
    """32 hexadecimal digits of bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of plain data: sorted keys, no spaces, UTF-8.

    Raises:
        TypeError, ValueError: the value is no plain data, or holds a number that is not finite.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def fingerprint_of(value: Any) -> str:
    """32 hexadecimal digits of plain data: equal exactly when the data is equal."""
    return bytes_hash(canonical_json(value))
