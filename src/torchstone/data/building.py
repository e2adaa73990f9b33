"""Progress of a build that takes a while: a bar on a terminal, else a plain line now and then; on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

QUIET = 5.0  # seconds between two plain lines


class Advance(Protocol):
    """Called with the number of documents and tokens so far."""

    def __call__(self, documents: int, tokens: int) -> None: ...


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """Yields a function that shows how far the work is; off a terminal, short work shows nothing.

    Args:
        what: what is made, for example "tokenising the corpus".
    """
    if sys.stderr.isatty():
        with _bar(what) as advance:
            yield advance
        return
    start = last = time.monotonic()

    def line(documents: int, tokens: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= QUIET:
            last = now
            seconds = now - start
            print(f"{what}: {documents:,} documents, {tokens:,} tokens, {seconds:.0f} s", file=sys.stderr)

    yield line


def report_skipped(kept: int, skipped: int, where: str) -> None:
    """Say how many rows of a corpus were left out, and which file lists them."""
    counts = f"{kept + skipped:,} rows read, {kept:,} kept, {skipped:,} skipped"
    print(f"{counts}; the skipped ones are in {where}", file=sys.stderr)


@contextmanager
def _bar(what: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(documents: int, tokens: int) -> None:
            bar.update(task, description=f"{what}: {documents:,} documents, {tokens:,} tokens")

        yield update
