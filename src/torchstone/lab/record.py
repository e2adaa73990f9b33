"""Cells on disk: `cells/ARM/seed-N/cell.json`, written once, read only under the same fingerprint.

A finished cell, or one that failed by its own doing, is kept and never run again. A cell whose worker was killed leaves
no record, so the same command runs it again. A record with another fingerprint is refused, never mixed in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchstone.errors import StudyError
from torchstone.lab.study import Measurement
from torchstone.report.result import Series
from torchstone.storage.atomic import atomic_write

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: a measurement, or an error."""

    fingerprint: str
    measurement: Measurement | None
    error: str = ""
    seconds: float = 0.0


def measurement_data(measurement: Measurement) -> dict[str, Any]:
    """Plain JSON data of a measurement; raises StudyError if a metric is not finite."""
    for name, value in measurement.metrics.items():
        if not math.isfinite(value):
            raise StudyError(f"metric {name!r} is {value}; a cell's metrics must be finite numbers.")
    return {
        "metrics": {name: float(value) for name, value in measurement.metrics.items()},
        "items": {name: {key: float(v) for key, v in items.items()} for name, items in measurement.items.items()},
        "series": {name: series.model_dump(mode="json") for name, series in measurement.series.items()},
        "extra": dict(measurement.extra),
        "tokens": measurement.tokens,
        "flops": measurement.flops,
        "peak_bytes": measurement.peak_bytes,
    }


def measurement_of(data: Mapping[str, Any]) -> Measurement:
    """The measurement that `measurement_data` wrote."""
    series = {name: Series.model_validate(value) for name, value in data["series"].items()}
    return Measurement(**{**data, "series": series})


class CellRecords:
    """The cells of one study directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def directory(self, arm: str, seed: int) -> Path:
        """The folder of a cell."""
        return self._root / "cells" / arm / f"seed-{seed}"

    def read(self, arm: str, seed: int, fingerprint: str) -> Outcome | None:
        """The record of a cell, or None if it has not run.

        Raises:
            StudyError: the record is damaged, or belongs to another configuration, code or torch version.
        """
        path = self.directory(arm, seed) / "cell.json"
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text())
            found = data["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{path} is damaged ({error}); delete that folder to run the cell again.") from error
        if found != fingerprint:
            raise StudyError(
                f"{path} was measured under fingerprint {found}, this study's cell is {fingerprint}: recipe, code, torch "
                "version or device differ. Results are never mixed: choose another --out, or delete that folder."
            )
        measurement = measurement_of(data["measurement"]) if data["measurement"] else None
        return Outcome(found, measurement, data["error"], data["seconds"])

    def write(self, arm: str, seed: int, outcome: Outcome) -> None:
        """Store the record atomically."""
        data = {
            "schema": SCHEMA,
            "fingerprint": outcome.fingerprint,
            "measurement": measurement_data(outcome.measurement) if outcome.measurement else None,
            "error": outcome.error,
            "seconds": outcome.seconds,
        }
        directory = self.directory(arm, seed)
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / "cell.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
