"""Where metrics go: the run's own append-only `metrics.jsonl`, and optional dashboards.

A record is flat: `kind` (train, validation), `step`, `tokens`, `flops`, `seconds`, `loss`, and whatever else was
measured. A run that was killed repeats the steps since its last checkpoint; readers keep the last record of each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torchstone.errors import DependencyError
from torchstone.storage.journal import Journal

AXES = ("steps", "tokens", "flops", "seconds")


class Sink(Protocol):
    """Receives metric records."""

    def write(self, record: Mapping[str, Any]) -> None:
        """One record."""

    def close(self) -> None:
        """Nothing more will come."""


class JournalSink:
    """`metrics.jsonl` of the run directory."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record."""
        self._journal.append(record)

    def close(self) -> None:
        """Every record is written already."""


class TensorBoardSink:
    """Scalars for TensorBoard, in `tensorboard/` of the run directory; raises DependencyError if it is not installed."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DependencyError("the sink tensorboard needs: pip install 'torchstone[tensorboard]'") from error
        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, record: Mapping[str, Any]) -> None:
        """Add every number of the record under its kind."""
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """Metrics for Weights & Biases; raises DependencyError if it is not installed."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise DependencyError("the sink wandb needs: pip install 'torchstone[wandb]'") from error
        self._run = wandb.init(dir=str(directory), config=dict(config), name=directory.name, resume="allow")

    def write(self, record: Mapping[str, Any]) -> None:
        """Log every number of the record under its kind."""
        numbers = {f"{record['kind']}/{name}": value for name, value in record.items() if isinstance(value, int | float)}
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def make_sinks(names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> list[Sink]:
    """The run's journal, and the named dashboards."""
    sinks: list[Sink] = [JournalSink(directory / "metrics.jsonl")]
    for name in names:
        sinks.append(TensorBoardSink(directory) if name == "tensorboard" else WandbSink(directory, config))
    return sinks


def read_history(directory: Path) -> tuple[dict[str, dict[str, list[Any]]], tuple[str, ...]]:
    """Curves by kind from `metrics.jsonl`, and warnings for lines that are damaged.

    Returns:
        kind → {steps, tokens, flops, seconds, loss, and every other metric that all records of the kind have}.
    """
    reading = Journal(directory / "metrics.jsonl").read()
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    for record in reading.records:
        by_kind.setdefault(record["kind"], {})[record["step"]] = record
    history = {}
    for kind, records in by_kind.items():
        ordered = [records[step] for step in sorted(records)]
        names = set.intersection(*(set(record) for record in ordered)) - {"kind", "step"} if ordered else set()
        columns = {name: [record[name] for record in ordered] for name in sorted(names)}
        history[kind] = {"steps": sorted(records), **columns}
        for name in (*AXES, "loss"):
            history[kind].setdefault(name, [])
    return history, reading.warnings
