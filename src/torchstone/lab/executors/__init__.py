"""Executors: where cells run. `make_executor` turns `--on` into one."""

from __future__ import annotations

from pathlib import Path

from torchstone.errors import ConfigError
from torchstone.lab.executors.base import Event, Executor, Job


def make_executor(on: str, *, slots: int | None, threads: int, logs: Path, devices: tuple[str, ...] = ()) -> Executor:
    """The executor that `on` names: `local`, `inline`, `ray`, or `ray://host:port`.

    Args:
        on: where to run.
        slots: jobs at a time; None lets the executor choose.
        threads: intra-op threads of one job.
        logs: folder for the workers' output.
        devices: CUDA devices to spread over local workers.

    Raises:
        ConfigError: unknown name.
        DependencyError: Ray is not installed.
    """
    if on == "inline":
        from torchstone.lab.executors.inline import InlineExecutor

        return InlineExecutor()
    if on == "local":
        from torchstone.lab.executors.local import LocalExecutor

        return LocalExecutor(slots or 1, threads, logs, devices)
    if on == "ray" or on.startswith("ray://"):
        from torchstone.lab.executors.ray import RayExecutor

        return RayExecutor(None if on == "ray" else on, slots, threads, gpus=1 if devices else 0)
    raise ConfigError(f"cannot run on {on!r}; allowed: local, inline, ray, ray://HOST:PORT.")


__all__ = ["Event", "Executor", "Job", "make_executor"]
