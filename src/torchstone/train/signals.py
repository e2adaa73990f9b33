"""Signals: the first asks the run to stop at the next step with a checkpoint, the second ends it at once.

Python delivers signals to the main thread only; in any other thread (a notebook's worker) nothing is installed and
the caller stops the run through `Stop.ask`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torchstone.errors import InterruptedRun

SHOW_CURSOR = b"\x1b[?25h\n"


class Stop:
    """A request to stop, set by a signal or by a caller in any thread."""

    def __init__(self) -> None:
        self.reason = ""

    def ask(self, reason: str) -> None:
        """Ask the run to stop after the current step; `reason` completes "stopped by …"."""
        self.reason = self.reason or reason

    def __bool__(self) -> bool:
        return bool(self.reason)


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[Stop]:
    """Inside the block, SIGTERM and SIGINT set `stop`; a second one exits at once with code 75."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop:
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(sys.stderr.fileno(), SHOW_CURSOR)  # a progress bar may have hidden it
            os._exit(InterruptedRun.exit_code)
        stop.ask(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
