"""What the runner asks of an executor: take jobs, hand back events.

A job is plain JSON, so that it can go to another process or machine. An executor holds at most `slots` jobs at a time.
A worker that dies is an event, never a hang: the runner learns which job it held and the last words of its log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Job:
    """One piece of work: a unique key, and the payload that `torchstone.lab.worker.perform` understands."""

    key: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """News of a job.

    `progress`: `value` holds what the cell reported · `done`: `value` is the answer · `failed`: the job raised, `error`
    says what · `died`: the worker is gone, or met
    something passing (a full disk, missing files); `error` says what, and the same command runs the job again.
    """

    key: str
    kind: Literal["progress", "done", "failed", "died"]
    value: dict[str, Any]
    error: str = ""


class Executor(Protocol):
    """Runs jobs somewhere."""

    slots: int

    def submit(self, job: Job) -> None:
        """Start a job; the caller keeps at most `slots` jobs in flight."""

    def wait(self, timeout: float) -> Sequence[Event]:
        """Events since the last call; waits at most `timeout` seconds for the first."""

    def close(self, *, kill: bool = False) -> None:
        """Stop all workers; with `kill`, ask running jobs to stop now (SIGTERM), then end them."""
