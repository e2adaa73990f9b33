"""Files and directories that appear whole or not at all.

A file is written beside its place, flushed to the disk, and renamed over it. A directory is filled under a
partial name, each file flushed, and renamed into a place that must be free. Then the parent is flushed, so
that the rename survives a power cut. A crash leaves the old content, or the new, and perhaps a partial name
that nothing reads.

`stage_hook` is called after each step with its name; tests kill the process there.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"


def _nothing(stage: str) -> None:
    """The hook outside tests."""


stage_hook: Callable[[str], None] = _nothing


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Inside the block, an OSError that names no file (a write to a full disk) gets the name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process or thread uses."""
    return path.with_name(f"{path.name}{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")


def partial_owner_lives(name: str) -> bool:
    """True if the process that made the partial `name` still runs on this machine."""
    pid = name.rpartition(PARTIAL)[2].partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Replace (or make) a file in one step; its folder must exist.

    Raises:
        OSError: with the file's name; the old file is untouched and nothing is left beside it.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    partial = _partial(path)
    with naming(path):
        try:
            with open(partial, "wb") as file:
                stage_hook("file opened")
                file.write(data)
                file.flush()
                stage_hook("file written")
                os.fsync(file.fileno())
            stage_hook("file flushed")
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        stage_hook("file renamed")
        fsync_path(path.parent)
        stage_hook("file's parent flushed")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder to fill; at the end of the block it becomes `path`, which must not exist.

    On an error the partial folder is removed and `path` is not made. If another process makes `path` first,
    the rename raises OSError and the other's folder stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    with naming(path):
        try:
            stage_hook("directory made")
            yield partial
            stage_hook("directory filled")
            for file in sorted(item for item in partial.rglob("*") if item.is_file()):
                fsync_path(file)
            stage_hook("files flushed")
            for folder in sorted((item for item in partial.rglob("*") if item.is_dir()), reverse=True):
                fsync_path(folder)
            fsync_path(partial)
            stage_hook("directory flushed")
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        stage_hook("directory renamed")
        fsync_path(path.parent)
        stage_hook("directory's parent flushed")
