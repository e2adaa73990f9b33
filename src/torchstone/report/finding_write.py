"""Write a finding into a folder, each file all or nothing.

finding.json     the truth
report.html      one self-contained page
report.md        the same without pictures
TABLE.csv        one per table and per coloured text, named by its title
figures/*.svg    every heat map and line chart as a still picture

Where the folder holds an earlier finding, that one's tables and pictures are removed first, so that none of them stands beside
numbers that it does not belong to. Nothing else in the folder is touched.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchstone.report import finding_page, heatmap, line_plot, token_texts
from torchstone.report.finding import Finding
from torchstone.report.markup import Markup
from torchstone.report.result import Table
from torchstone.storage.atomic import atomic_write
from torchstone.storage.names import csv_cell

FINDING, HTML, MARKDOWN, FIGURES = "finding.json", "report.html", "report.md", "figures"


def write(finding: Finding, directory: Path) -> Path:
    """Write everything into `directory`; returns the path of `report.html`."""
    directory = Path(directory)
    (directory / FIGURES).mkdir(parents=True, exist_ok=True)
    files = _files(finding)
    for stale in _earlier(directory) - set(files):
        if (directory / stale).is_file():
            (directory / stale).unlink()
    data = json.dumps(finding.model_dump(mode="json"), ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write(directory / FINDING, data + "\n")  # first, so that the files of a write that was killed are known
    for name, content in files.items():
        atomic_write(directory / name, content())
    atomic_write(directory / MARKDOWN, finding_page.text(finding))
    atomic_write(directory / HTML, finding_page.page(finding))
    return directory / HTML


def _files(finding: Finding) -> dict[str, Callable[[], str]]:
    """Tables and pictures: path in the folder → what makes its content."""
    pictures: list[tuple[str, Callable[[], str]]] = [
        *((one.title, partial(_drawn, heatmap.svg, one)) for one in finding.heatmaps),
        *((chart.title, partial(_drawn, line_plot.svg, chart)) for chart in finding_page.charts_of(finding)),
    ]
    written = [*finding.tables, *map(token_texts.as_table, finding.token_texts)]
    tables = zip(_names([table.title for table in written]), written, strict=True)
    figures = zip(_names([title for title, _ in pictures]), pictures, strict=True)
    return {
        **{f"{name}.csv": partial(as_csv, table) for name, table in tables},
        **{f"{FIGURES}/{name}.svg": draw for name, (_, draw) in figures},
    }


def _earlier(directory: Path) -> set[str]:
    """Tables and pictures of the finding that the folder holds; none where it holds none that can be read."""
    try:
        return set(_files(Finding.model_validate_json((directory / FINDING).read_bytes())))
    except (OSError, ValueError):
        return set()


def as_csv(table: Table) -> str:
    """The table as CSV in full precision; text that a spreadsheet would run as a formula is quoted with an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([csv_cell(column) for column in table.columns])
    for row in table.rows:
        writer.writerow(["" if value is None else csv_cell(value) for value in row])
    return stream.getvalue()


def _drawn(draw: Callable[[Any], Markup], what: Any) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{draw(what)}\n'


def _names(titles: list[str]) -> list[str]:
    """File names made of titles, all different."""
    names: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "table"
        number = len(names)
        while name in names:
            name, number = f"{name}-{number}", number + 1
        names.append(name)
    return names
