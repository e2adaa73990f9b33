"""Files by path, glob or URL, through fsspec: local disks, archives, object stores, HTTP."""

from __future__ import annotations

from typing import Any

import fsspec

from torchstone.errors import DataError, DependencyError


def expand(location: str) -> list[str]:
    """Every file that a path, glob or URL names, sorted.

    Raises:
        DataError: there is none, or the location cannot be read.
        DependencyError: its protocol needs a package that is not installed.
    """
    try:
        opened = fsspec.open_files(location, mode="rb")
        remote = "://" in location or "::" in location
        found = sorted(file.full_name if remote else file.path for file in opened if file.fs.isfile(file.path))
    except ImportError as error:
        raise DependencyError(f"reading {location!r} needs a package that is not installed: {error}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{location!r} cannot be opened: {error}") from error
    if not found:
        raise DataError(f"no file matches {location!r}; give a path, a glob such as 'data/*.jsonl', or a URL.")
    return found


def open_binary(location: str) -> Any:
    """The file's bytes, as a file object to be used in `with`; raises DataError if it cannot be opened."""
    try:
        return fsspec.open(location, mode="rb").open()
    except ImportError as error:
        raise DependencyError(f"reading {location!r} needs a package that is not installed: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{location!r} cannot be opened: {error}") from error
