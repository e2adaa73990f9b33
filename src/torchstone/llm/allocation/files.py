"""Write the answer to an allocation request as files: CSV for spreadsheets, JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torchstone.llm.allocation.summary import Summary, row_data
from torchstone.storage.atomic import atomic_write
from torchstone.storage.names import csv_cell


def write_summary(summary: Summary, directory: str | Path) -> list[Path]:
    """Write `allocation.csv`, `order.csv`, `curve.csv`, `adds.csv` and `allocation.json`, each in one step.

    Args:
        summary: what `summarise` returned.
        directory: made if absent; files of the same names are replaced.

    Returns:
        The paths written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = summary.allocation
    names = found.configurations
    samples = zip(names, found.counts.tolist(), found.cost.tolist(), strict=True)
    curve = [row_data(row) for row in summary.rows]
    adds = [[name, *row] for name, row in zip(names, summary.adds.tolist(), strict=True)]
    contents = {
        "allocation.csv": _csv(["configuration", "samples", "cost per sample"], samples),
        "order.csv": _csv(["draw", "configuration"], [[i + 1, names[s]] for i, s in enumerate(found.order)]),
        "curve.csv": _csv(list(curve[0]), [list(row.values()) for row in curve]),
        "adds.csv": _csv(["solved never by / solved by", *names], adds),
        "allocation.json": json.dumps(summary.as_json(), indent=1, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        atomic_write(directory / name, content)
    return [directory / name for name in contents]


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([csv_cell(value) for value in row])
    return buffer.getvalue()
