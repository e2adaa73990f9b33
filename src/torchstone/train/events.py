"""Where metrics go: the run's own append-only `metrics.jsonl`, and optional dashboards.

A record is flat: `kind` (train, validation), `step`, `tokens`, `flops`, `seconds`, `loss`, and whatever else was
measured. A run that was killed repeats the steps since its last checkpoint; readers keep the last record of each
step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torchstone.errors import DependencyError
from torchstone.storage.journal import Journal

METRICS = "metrics.jsonl"
AXES = ("steps", "tokens", "flops", "seconds")


class Sink(Protocol):
    """Receives metric records."""

    def write(self, record: Mapping[str, Any]) -> None:
        """One record."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


@dataclass(frozen=True)
class RunIdentity:
    """What dashboards need to know of a run: its directory, an id that resumes keep, its recipe, the step it is at."""

    directory: Path
    id: str
    recipe: Mapping[str, Any]
    step: int = 0


class JournalSink:
    """`metrics.jsonl` of the run directory."""

    def __init__(self, run: RunIdentity) -> None:
        self._journal = Journal(run.directory / METRICS)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record."""
        self._journal.append(record)

    def close(self) -> None:
        """Every record is written already."""


class TensorBoardSink:
    """Scalars in `tensorboard/` of the run directory. Raises DependencyError if TensorBoard is not installed."""

    def __init__(self, run: RunIdentity) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DependencyError("the sink tensorboard needs: pip install 'torchstone[tensorboard]'") from error
        folder = str(run.directory / "tensorboard")
        self._writer: Any = SummaryWriter(folder, purge_step=run.step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add every number of the record under its kind."""
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """Metrics for Weights & Biases. Raises DependencyError if it is not installed."""

    def __init__(self, run: RunIdentity) -> None:
        try:
            import wandb
        except ImportError as error:
            raise DependencyError("the sink wandb needs: pip install 'torchstone[wandb]'") from error
        self._run = wandb.init(
            dir=str(run.directory), config=dict(run.recipe), name=run.directory.name, id=run.id, resume="allow"
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log every number of the record under its kind."""
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


SINKS: dict[str, Callable[[RunIdentity], Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink}


def make_sinks(names: Sequence[str], run: RunIdentity) -> list[Sink]:
    """The run's journal, and the named dashboards; raises DependencyError if one is not installed."""
    return [JournalSink(run), *(SINKS[name](run) for name in names)]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name != "step"
    }


def read_history(directory: Path, last: int | None = None) -> tuple[dict[str, dict[str, list[Any]]], tuple[str, ...]]:
    """Curves by kind from `metrics.jsonl`, and warnings for lines that are damaged.

    Args:
        directory: of the run.
        last: step after which records are left out: a killed run may have recorded more than it later kept.

    Returns:
        kind → {steps, tokens, flops, seconds, loss, and every other metric that all records of the kind have}.
    """
    reading = Journal(directory / METRICS).read()
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    warnings = list(reading.warnings)
    for record in reading.records:
        if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int):
            if last is None or record["step"] <= last:
                by_kind.setdefault(record["kind"], {})[record["step"]] = record
        else:
            warnings.append(f"{directory / METRICS}: a record without kind or step, ignored")
    return {kind: _columns(records) for kind, records in by_kind.items()}, tuple(warnings)


def _columns(records: Mapping[int, Mapping[str, Any]]) -> dict[str, list[Any]]:
    ordered = [records[step] for step in sorted(records)]
    names = set.intersection(*(set(record) for record in ordered)) - {"kind", "step"} if ordered else set()
    columns = {name: [record[name] for record in ordered] for name in sorted(names)}
    empty: dict[str, list[Any]] = {name: [] for name in (*AXES, "loss")}
    return {**empty, **columns, "steps": sorted(records)}
