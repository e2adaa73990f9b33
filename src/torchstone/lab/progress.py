"""Progress of a study: a live table on a terminal, one plain line per event elsewhere.

Everything goes to standard error, so that standard output holds only results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from torchstone.storage.names import safe_text


class Progress(Protocol):
    """What the runner tells whoever is watching."""

    def stage(self, title: str, total: int, finished: int) -> None:
        """A stage begins: `total` cells, of which `finished` are there already."""

    def started(self, cell: str) -> None:
        """A cell begins."""

    def moved(self, cell: str, state: Mapping[str, Any]) -> None:
        """A cell reports `step`, `steps`, `loss`."""

    def ended(self, cell: str, error: str) -> None:
        """A cell ended; `error` is empty if it went well."""

    def say(self, text: str) -> None:
        """A line for the reader."""

    def close(self) -> None:
        """Nothing more will come."""


class Quiet:
    """Shows nothing."""

    def stage(self, title: str, total: int, finished: int) -> None:
        """Ignored."""

    def started(self, cell: str) -> None:
        """Ignored."""

    def moved(self, cell: str, state: Mapping[str, Any]) -> None:
        """Ignored."""

    def ended(self, cell: str, error: str) -> None:
        """Ignored."""

    def say(self, text: str) -> None:
        """Ignored."""

    def close(self) -> None:
        """Ignored."""


class Lines(Quiet):
    """One line per event, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._begun = time.monotonic()
        self._total = self._finished = 0

    def _line(self, text: str) -> None:
        elapsed = time.monotonic() - self._begun
        print(f"[{elapsed:7.1f}s] {safe_text(text)}", file=self._stream, flush=True)

    def stage(self, title: str, total: int, finished: int) -> None:
        """Print the stage's title and size."""
        self._total, self._finished = total, finished
        cached = f", {finished} of them finished before" if finished else ""
        self._line(f"{title}: {total} cells{cached}")

    def ended(self, cell: str, error: str) -> None:
        """Print that the cell is done, or why it failed."""
        self._finished += 1
        self._line(f"{self._finished}/{self._total} {cell} {'FAILED: ' + error if error else 'done'}")

    def say(self, text: str) -> None:
        """Print the line."""
        self._line(text)


class Live(Quiet):
    """Bars of rich: one for the stage, one for each running cell."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=False,
        )
        self._bars.start()
        self._stage: Any = None
        self._cells: dict[str, Any] = {}

    def stage(self, title: str, total: int, finished: int) -> None:
        """A new bar for the stage."""
        self._stage = self._bars.add_task(safe_text(title), total=total, completed=finished, note="")

    def started(self, cell: str) -> None:
        """A new bar for the cell."""
        self._cells[cell] = self._bars.add_task("  " + safe_text(cell), total=None, note="")

    def moved(self, cell: str, state: Mapping[str, Any]) -> None:
        """Move the cell's bar and show its loss."""
        if cell in self._cells:
            loss = state.get("loss")
            note = f"loss {loss:.3f}" if isinstance(loss, float) else ""
            self._bars.update(self._cells[cell], completed=state.get("step"), total=state.get("steps"), note=note)

    def ended(self, cell: str, error: str) -> None:
        """Remove the cell's bar; a failure stays as a line."""
        if cell in self._cells:
            self._bars.remove_task(self._cells.pop(cell))
        if error:
            self.say(f"{cell} FAILED: {error}")
        self._bars.advance(self._stage)

    def say(self, text: str) -> None:
        """Print the line above the bars."""
        self._bars.console.print(safe_text(text), markup=False, highlight=False)

    def close(self) -> None:
        """Stop drawing."""
        self._bars.stop()


def choose_progress() -> Progress:
    """Live bars on a terminal, lines otherwise."""
    return Live() if sys.stderr.isatty() else Lines()
