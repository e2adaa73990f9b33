"""Progress of one analysis on standard error: a status line on a terminal, a plain line every few seconds elsewhere.

An analysis says nothing of its own progress. What it does is seen at the subject: passes of the model are counted as they
begin, and layers are noted as they are shown or as their weights are read. The seconds go on where no model runs, as while
heads are trained.

Counting calls the subject's own methods with what they were given, so that an analysis gives the same numbers.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from torchstone.storage.names import safe_text

PLAIN_SECONDS = 5.0
PASSES = ("logits", "losses", "hidden_states", "visit")


class AnalysisProgress:
    """Shows how far an analysis is, inside a `with` block."""

    def __init__(self, title: str) -> None:
        self.title, self.passes = title, 0
        self._place = ""
        self._begun = time.monotonic()
        self._shown = ExitStack()

    def __enter__(self) -> AnalysisProgress:
        if sys.stderr is None:
            return self
        if sys.stderr.isatty():
            from rich.console import Console

            self._shown.enter_context(Console(stderr=True).status(self))
        else:
            done = threading.Event()
            threading.Thread(target=self._print, args=(done,), daemon=True).start()
            self._shown.callback(done.set)
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.close()

    def line(self) -> str:
        """Seconds, passes and the last layer, in words."""
        parts = [f"{time.monotonic() - self._begun:,.0f} s"]
        if self.passes:
            parts.append(f"{self.passes:,} passes of the model")
        return safe_text(f"{self.title}: {', '.join([*parts, *filter(None, [self._place])])}")

    def __rich__(self) -> Any:
        """The line as it is when the terminal is drawn."""
        from rich.text import Text

        return Text(self.line())

    def _print(self, done: threading.Event) -> None:
        while not done.wait(PLAIN_SECONDS):
            with suppress(OSError, ValueError):  # nobody reads standard error any more
                print(self.line(), file=sys.stderr, flush=True)

    def follow(self, subject: Any) -> None:
        """Count what a subject does, and what its untrained controls do.

        Args:
            subject: of this analysis alone; its methods are replaced by ones that count and then do the same.
        """
        for name in PASSES:
            _replace(subject, name, self._counted)
        _replace(subject, "visit", self._showing(len(subject.layers)))
        _replace(subject, "untrained", self._following)
        for layer in subject.layers:
            _replace(layer, "weights", self._noting(layer.index, len(subject.layers)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **options: Any) -> Any:
            self.passes += 1
            self._place = ""
            return method(*given, **options)

        return count

    def _showing(self, layers: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(visit: Callable[..., Any]) -> Callable[..., Any]:
            def show(tokens_bt: Any, look: Callable[..., Any], **options: Any) -> Any:
                def note(layer: Any, activations: Any) -> None:
                    self._at(layer.index, layers)
                    look(layer, activations)

                return visit(tokens_bt, note, **options)

            return show

        return wrap

    def _noting(self, index: int, layers: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
            def note(*given: Any, **options: Any) -> Any:
                self._at(index, layers)
                return method(*given, **options)

            return note

        return wrap

    def _following(self, untrained: Callable[..., Any]) -> Callable[..., Any]:
        def make(*given: Any, **options: Any) -> Any:
            self._place = "making the untrained control"
            fresh = untrained(*given, **options)
            self.follow(fresh)
            return fresh

        return make

    def _at(self, index: int, layers: int) -> None:
        self._place = f"layer {index + 1} of {layers}"


def _replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Give one object another method of the same name."""
    setattr(owner, name, wrap(getattr(owner, name)))
