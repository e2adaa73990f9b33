"""Executor on a Ray cluster: one Ray task per job, results come back through Ray's object store.

`--on ray` starts or joins the local cluster; `--on ray://HOST:PORT` joins another. Cells write their checkpoints on the
worker's own disk; only the measurement comes back, so that no shared file system is needed. torchstone must be
installed on every node (the same version: a cell whose code fingerprint differs is refused).

Ray is an optional dependency and is imported when the executor is made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError, DependencyError
from torchstone.lab.executors.base import Event, Job
from torchstone.lab.executors.local import THREAD_VARIABLES


def _remote_perform(payload: dict[str, Any]) -> dict[str, Any]:
    """Run on a node: perform the job in a scratch folder there, and hand back plain data."""
    from torchstone.errors import InterruptedRun
    from torchstone.lab.worker import failure, is_passing, perform

    with tempfile.TemporaryDirectory(prefix="torchstone-") as scratch:
        local = {**payload, "directory": str(Path(scratch) / "cell")}
        try:
            return {"kind": "done", "value": perform(local, lambda progress: None)}
        except Exception as error:  # a failed cell is a record, whatever the cell raised
            passing = is_passing(error) or isinstance(error, InterruptedRun)
            return {"kind": "died" if passing else "failed", "error": failure(error)}


class RayExecutor:
    """See `torchstone.lab.executors.base.Executor`.

    Args:
        address: None for the cluster of this machine (started if there is none), else Ray's address.
        slots: jobs in flight; None takes the cluster's CPUs.
        threads: intra-op threads, and Ray CPUs, of one job.
        gpus: Ray GPUs of one job.

    Raises:
        DependencyError: Ray is not installed.
        ConfigError: no cluster answers at `address`.
    """

    def __init__(self, address: str | None, slots: int | None, threads: int, gpus: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise DependencyError("the ray executor needs Ray: pip install 'torchstone[ray]'") from error
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"no Ray cluster answers at {address!r}: {error}. Start one with `ray start --head`."
                ) from error
        cpus = int(ray.cluster_resources().get("CPU", 1))
        self.slots = max(1, slots or cpus // threads)
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
        self._task = ray.remote(_remote_perform).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": variables},
        )
        self._running: dict[Any, str] = {}

    def submit(self, job: Job) -> None:
        """Send the job to the cluster."""
        self._running[self._task.remote(job.payload)] = job.key

    def wait(self, timeout: float) -> Sequence[Event]:
        """Finished jobs; a lost worker or node becomes a `died` event."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout) if self._running else ([], [])
        events = []
        for handle in ready:
            key = self._running.pop(handle)
            try:
                answer = self._ray.get(handle)
            except self._ray.exceptions.RayError as error:
                events.append(Event(key, "died", {}, f"Ray lost the job: {str(error).strip().splitlines()[0]}"))
            else:
                events.append(Event(key, answer["kind"], answer.get("value", {}), answer.get("error", "")))
        return events

    def close(self, *, kill: bool = False) -> None:
        """Cancel what runs (with `kill`), and leave the cluster if this executor joined it."""
        for handle in self._running:
            self._ray.cancel(handle, force=kill)
        self._running.clear()
        if self._started:
            self._ray.shutdown()
