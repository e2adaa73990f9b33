"""Files by path, glob or URL, through fsspec: local disks, archives, object stores, HTTP."""

from __future__ import annotations

from typing import Any

import fsspec
import xxhash

from torchstone.errors import DataError, DependencyError

_CHUNK = 1 << 20


def expand(location: str) -> list[str]:
    """Every file that a path, glob or URL names, sorted.

    Raises:
        DataError: there is none, or the location cannot be read.
        DependencyError: its protocol needs a package that is not installed.
    """
    try:
        opened = fsspec.open_files(location, mode="rb")
        remote = "://" in location or "::" in location
        found = sorted(
            file.full_name if remote else file.path for file in opened if file.fs.isfile(file.path)
        )
    except ImportError as error:
        raise DependencyError(
            f"reading {location!r} needs a package that is not installed: {error}"
        ) from error
    except (ValueError, OSError) as error:
        raise DataError(f"{location!r} cannot be opened: {error}") from error
    if not found:
        raise DataError(
            f"no file matches {location!r}; give a path, a glob such as 'data/*.jsonl', or a URL."
        )
    return found


def open_binary(location: str) -> Any:
    """The file's bytes, as a file object to be used in `with`; raises DataError if it cannot be opened."""
    try:
        return fsspec.open(location, mode="rb").open()
    except ImportError as error:
        raise DependencyError(
            f"reading {location!r} needs a package that is not installed: {error}"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{location!r} cannot be opened: {error}") from error


def location_hash(location: str) -> tuple[int, str]:
    """Bytes and xxh3 hash (32 hexadecimal digits) of one file; raises DataError if it cannot be read."""
    digest, size = xxhash.xxh3_128(), 0
    with open_binary(location) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
