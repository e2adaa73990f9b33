"""Records of updates: as curves, as one number for early against late, and as the file that a run keeps.

A record is what `UpdateMeter` measured of one update: `step` (the first is 1), `rate` (of the first parameter group),
numbers of all matrices together, and `matrices`, the same by matrix. A number that does not exist is absent.

    early   median over steps 1 … 5            late   median over 50 … 80 % of the steps
    ratio   early / late

Pitfall: the sizes of updates follow the learning rate. Early and late compare only if the rate is the same in both,
or after division by it (`per_rate`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchstone.errors import DataError
from torchstone.storage.journal import Journal

UPDATES = "updates.jsonl"
EARLY, LATE = 5, (0.5, 0.8)
Record = Mapping[str, Any]
NAMES = {
    "l2": "l2 norm",
    "rms": "root mean square",
    "relative": "relative size",
    "angle": "angle",
    "neuron_angle": "angle of a neuron",
    "rrc": "relative representation change",
    "neuron_rrc": "the same of a neuron",
    "snr": "signal-to-noise ratio",
    "critical_batch": "critical batch size",
    "alignment": "cosine of gradient and momentum",
}


@dataclass(frozen=True)
class EarlyLate:
    """A number early and late in training. `ratio` is None where late is zero."""

    early: float
    late: float

    @property
    def ratio(self) -> float | None:
        """Early over late."""
        return self.early / self.late if self.late else None


def curve(records: Sequence[Record], name: str, matrix: str | None = None) -> tuple[list[int], list[float]]:
    """Steps and values of one number, of all matrices together or of one; steps without it are left out."""
    steps, values = [], []
    for record in records:
        found = record if matrix is None else record["matrices"].get(matrix, {})
        if found.get(name) is not None:
            steps.append(record["step"])
            values.append(float(found[name]))
    return steps, values


def early_late(steps: Sequence[int], values: Sequence[float], last: int | None = None) -> EarlyLate | None:
    """Medians over the first steps and over the late ones; None if either has no value.

    Args:
        steps, values: a curve.
        last: step that counts as the end; None: the last of the curve.
    """
    end = last if last is not None else (steps[-1] if steps else 0)
    early = [value for step, value in zip(steps, values, strict=True) if step <= EARLY]
    late = [value for step, value in zip(steps, values, strict=True) if LATE[0] * end <= step <= LATE[1] * end]
    if not early or not late:
        return None
    return EarlyLate(statistics.median(early), statistics.median(late))


def per_rate(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """A curve divided by the learning rate of its step, as a share of the largest rate."""
    steps, values = curve(records, name)
    rates = {record["step"]: record["rate"] for record in records}
    peak = max(rates.values(), default=0.0)
    kept = [(step, value * peak / rates[step]) for step, value in zip(steps, values, strict=True) if rates[step] > 0]
    return [step for step, _ in kept], [value for _, value in kept]


def read_updates(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The records of a file or of a run directory that has one, by step.

    Args:
        path: `updates.jsonl`, or the folder that holds it.
        last: step after which records are left out; a killed run may have recorded more than it later kept.

    Raises:
        DataError: there is no such file, or no record in it.
    """
    file = path / UPDATES if path.is_dir() else path
    found: dict[int, dict[str, Any]] = {}
    for record in Journal(file).read().records:
        step = record.get("step")
        if isinstance(step, int) and isinstance(record.get("matrices"), dict) and (last is None or step <= last):
            found[step] = record
    if not found:
        raise DataError(
            f"{file} {'holds no record of updates' if file.exists() else 'does not exist'}; train with an UpdateWatch (or with "
            "the callback for transformers and a path), which writes it."
        )
    return [found[step] for step in sorted(found)]
