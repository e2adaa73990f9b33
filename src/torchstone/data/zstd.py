"""Zstandard streams whose end is checked.

A Zstandard file is one frame or several, one after the other. The stream reader of the zstandard package
takes a file that was cut off inside a frame for a complete one and gives fewer rows without a word; here that
is an EOFError.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import zstandard

_PIECE = 1024  # compressed bytes at a time; a hostile piece cannot grow beyond some 32 MB


def open_zstandard(file: BinaryIO) -> BinaryIO:
    """The decompressed bytes of a file.

    Raises (while it is read):
        EOFError: the file ends inside a frame.
        zstandard.ZstdError: the bytes are no Zstandard frame, or damaged.
    """
    return io.BufferedReader(_Frames(file))


class _Frames(io.RawIOBase):
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._compressed or self._file.read(_PIECE)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._decompress(compressed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, compressed: bytes) -> None:
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(self._frame.decompress(compressed))
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
