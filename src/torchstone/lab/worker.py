"""Perform one job: prepare a study, or measure one cell. Also the worker process of the local executor.

A job's payload is JSON: `task`, the study's `reference`, the arm, seed, scale, settings, directory, and the fingerprint
of the code that the runner saw; a worker with other code refuses. Answers are plain data too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchstone.errors import (
    CheckpointError,
    DataError,
    DependencyError,
    InterruptedRun,
    TorchstoneError,
    WorkerError,
)
from torchstone.lab.catalogue import from_reference
from torchstone.lab.record import measurement_data
from torchstone.lab.study import Arm, Cell

PROGRESS_SECONDS = 0.5
PARENT_SECONDS = 0.2
PASSING = (OSError, MemoryError, CheckpointError, DataError, DependencyError, WorkerError)


def perform(payload: Mapping[str, Any], report: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Do what the payload asks and return plain data.

    Raises:
        WorkerError: this process has other code or another torch than the runner.
        TorchstoneError: whatever the cell raises.
    """
    from torchstone.recipe.fingerprint import code_fingerprint, torch_version

    if payload["code"] != code_fingerprint():
        raise WorkerError(
            f"this worker's torchstone differs from the runner's (code {code_fingerprint()} against {payload['code']}); "
            "install the same version on every machine, and do not edit the source while a study runs."
        )
    if payload["torch"] != torch_version():
        raise WorkerError(
            f"this worker has torch {torch_version()}, the runner {payload['torch']}; install the same version."
        )
    study = from_reference(payload["reference"])
    directory = Path(payload["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    if payload["task"] == "prepare":
        return study.prepare([Arm(**arm) for arm in payload["arms"]], payload["settings"], directory)
    cell = Cell(
        arm=Arm(**payload["arm"]),
        seed=payload["seed"],
        scale=payload["scale"],
        settings=payload["settings"],
        directory=directory,
        prepared=payload["prepared"],
        report=report,
    )
    started = time.perf_counter()
    measurement = study.measure(cell)
    return {"measurement": measurement_data(measurement), "seconds": time.perf_counter() - started}


def is_passing(error: BaseException) -> bool:
    """True for what may be gone at the next try (disk, memory, files, packages); a cell that failed by itself is not."""
    return isinstance(error, PASSING) or type(error).__name__ == "OutOfMemoryError"


def failure(error: BaseException) -> str:
    """One line for a failed cell: the message of a typed error, else the type, message and place."""
    if isinstance(error, TorchstoneError):
        return f"{type(error).__name__}: {error}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"


def _throttled(send: Callable[[dict[str, Any]], None]) -> Callable[[Mapping[str, Any]], None]:
    last = 0.0

    def report(progress: Mapping[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            send({"kind": "progress", "value": dict(progress)})

    return report


def _stop_with_parent(parent: int) -> None:
    """End this process (saving a checkpoint) soon after the runner is gone, whose leases others then take."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main(answers: int) -> int:
    """Serve jobs from standard input until it closes; answers go to the file descriptor `answers`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner decides; it sends SIGTERM
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        data = json.dumps(message, allow_nan=False).encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]

    for line in sys.stdin.buffer:
        try:
            send({"kind": "done", "value": perform(json.loads(line), _throttled(send))})
        except InterruptedRun as stop:
            print(stop, file=sys.stderr)
            return stop.exit_code
        except Exception as error:  # a failed cell is a record, whatever the cell raised
            traceback.print_exc()
            send({"kind": "died" if is_passing(error) else "failed", "error": failure(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
