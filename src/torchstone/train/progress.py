"""Live progress of one training run: a bar on a terminal, a line every few seconds elsewhere, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

PLAIN_SECONDS = 10.0


class TrainingProgress:
    """Call it with `step, steps, loss, tokens_per_second`; close it at the end."""

    def __init__(self, title: str) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._title = title
        self._last = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
            )
            self._bar.start()

    def __call__(self, state: Mapping[str, Any]) -> None:
        """Show the state of a step."""
        note = f"loss {state['loss']:.4f}  {state['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._title, total=state["steps"], note=note)
            self._bar.update(self._task, completed=state["step"], note=note)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS or state["step"] == state["steps"]:
            self._last = now
            left = (state["steps"] - state["step"]) * state["tokens_per_step"] / max(state["tokens_per_second"], 1e-9)
            print(f"step {state['step']}/{state['steps']}  {note}  ETA {left:,.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()


Reporter = Callable[[Mapping[str, Any]], None]
