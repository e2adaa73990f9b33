"""Executor with worker processes on this machine.

Each worker is `python -m torchstone.lab.worker`, fed one JSON line per job; it answers with JSON lines on a pipe of its
own, while whatever a cell prints goes to a log file. A worker keeps its imports between jobs. Small models run with
one intra-op thread per worker, which on a shared machine is many times faster than several.

A worker that dies is replaced when the next job needs it; its exit status and the end of its log go into the event.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchstone.lab.executors.base import Event, Job

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
GRACE_SECONDS = 20.0


class _Worker:
    """One child process: a pipe in, a pipe out, a log."""

    def __init__(self, index: int, threads: int, log: Path, device: str | None) -> None:
        self.log = log
        self.job: Job | None = None
        self._buffer = b""
        environment = {
            **os.environ,
            **dict.fromkeys(THREAD_VARIABLES, str(threads)),
            "TORCHSTONE_WORKER": str(index),
        }
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        read, write = os.pipe()
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torchstone.lab.worker", str(write)],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                pass_fds=(write,),
                env=environment,
                start_new_session=True,
            )
        os.close(write)
        self.answers = read

    def send(self, job: Job) -> None:
        assert self.process.stdin is not None
        self.job = job
        self.process.stdin.write(json.dumps(job.payload).encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Complete messages that have arrived, and whether the worker has closed its pipe."""
        chunk = os.read(self.answers, 1 << 20)
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines if line], not chunk

    def last_words(self) -> str:
        status = self.process.wait()
        how = f"killed by signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        tail = self.log.read_bytes()[-2000:].decode("utf-8", "replace").strip().splitlines()
        return f"worker ended ({how})" + (f": {tail[-1]}" if tail else "")

    def stop(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.answers)


class LocalExecutor:
    """Up to `slots` worker processes, started when first needed.

    Args:
        slots: number of workers.
        threads: intra-op threads of each worker.
        logs: folder for the workers' output.
        devices: CUDA device index for each slot, or empty to leave the choice to the cell.
    """

    def __init__(self, slots: int, threads: int, logs: Path, devices: Sequence[str] = ()) -> None:
        self.slots = slots
        self._threads = threads
        self._logs = logs
        self._devices = tuple(devices)
        self._workers: list[_Worker | None] = [None] * slots
        logs.mkdir(parents=True, exist_ok=True)

    def submit(self, job: Job) -> None:
        """Hand the job to an idle worker, starting one if there is room."""
        for index, worker in enumerate(self._workers):
            if worker is None:
                device = self._devices[index % len(self._devices)] if self._devices else None
                worker = _Worker(index, self._threads, self._logs / f"worker-{os.getpid()}-{index}.log", device)
                self._workers[index] = worker
            if worker.job is None:
                worker.send(job)
                return
        raise AssertionError("more jobs submitted than there are slots")

    def wait(self, timeout: float) -> Sequence[Event]:
        """Events from any worker; a closed pipe becomes a `died` event."""
        live = {worker.answers: index for index, worker in enumerate(self._workers) if worker is not None}
        ready, _, _ = select.select(list(live), [], [], timeout)
        events: list[Event] = []
        for descriptor in ready:
            events.extend(self._collect(live[descriptor]))
        return events

    def _collect(self, index: int) -> list[Event]:
        worker = self._workers[index]
        assert worker is not None
        messages, closed = worker.read()
        events = []
        for message in messages:
            assert worker.job is not None
            events.append(Event(worker.job.key, message["kind"], message.get("value", {}), message.get("error", "")))
            if message["kind"] != "progress":
                worker.job = None
        if closed:
            if worker.job is not None:
                events.append(Event(worker.job.key, "died", {}, worker.last_words()))
            worker.stop()
            self._workers[index] = None
        return events

    def close(self, *, kill: bool = False) -> None:
        """Close every worker's input; with `kill`, send SIGTERM first so that training saves its checkpoint."""
        live = [worker for worker in self._workers if worker is not None]
        if kill:
            for worker in live:
                if worker.process.poll() is None:
                    worker.process.send_signal(signal.SIGTERM)
        for worker in live:
            worker.stop()
        self._workers = [None] * self.slots
