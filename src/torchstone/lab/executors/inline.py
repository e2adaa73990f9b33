"""Executor that runs jobs in the calling process, one at a time. For notebooks, debugging and unregistered kinds."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.errors import InterruptedRun
from torchstone.lab.executors.base import Event, Job
from torchstone.lab.worker import failure, is_passing, perform


class InlineExecutor:
    """See `torchstone.lab.executors.base.Executor`."""

    slots = 1

    def __init__(self) -> None:
        self._events: list[Event] = []

    def submit(self, job: Job) -> None:
        """Run the job to its end; its events wait for `wait`."""
        try:
            value = perform(job.payload, lambda progress: None)
        except InterruptedRun:
            raise
        except Exception as error:  # a failed cell is a record, whatever the cell raised
            self._events.append(Event(job.key, "died" if is_passing(error) else "failed", {}, failure(error)))
        else:
            self._events.append(Event(job.key, "done", value))

    def wait(self, timeout: float) -> Sequence[Event]:
        """The events of the jobs that were submitted since the last call."""
        events, self._events = self._events, []
        return events

    def close(self, *, kill: bool = False) -> None:
        """Nothing to stop."""
