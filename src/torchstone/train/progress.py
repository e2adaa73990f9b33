"""Live progress of one training run: a bar on a terminal, a line every few seconds elsewhere, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

PLAIN_SECONDS = 10.0
SMOOTHING = 0.9  # of the shown speed, per step

Reporter = Callable[[Mapping[str, Any]], None]


class TrainingProgress:
    """Call it after every step with `step, steps, loss, tokens_per_second, tokens_per_step`; close it at the end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None
        self._task: Any = None
        self._speed: float | None = None
        self._last = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()

    def __call__(self, state: Mapping[str, Any]) -> None:
        """Show the state after a step."""
        now = state["tokens_per_second"]
        self._speed = now if self._speed is None else SMOOTHING * self._speed + (1 - SMOOTHING) * now
        note = f"loss {state['loss']:.4f}  {self._speed:,.0f} tokens/s"
        if self._bar is not None:
            self._draw(state, note)
        else:
            self._print(state, note)

    def _draw(self, state: Mapping[str, Any], note: str) -> None:
        if self._task is None:
            self._task = self._bar.add_task(self._title, total=state["steps"], note=note)
        self._bar.update(self._task, completed=state["step"], note=note)

    def _print(self, state: Mapping[str, Any], note: str) -> None:
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and state["step"] != state["steps"]:
            return
        self._last = now
        left = (state["steps"] - state["step"]) * state["tokens_per_step"] / max(self._speed or 0.0, 1e-9)
        print(f"step {state['step']}/{state['steps']}  {note}  ETA {left:,.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
