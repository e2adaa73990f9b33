"""Write a finding into a folder, each file all or nothing.

finding.json     the truth
report.html      one self-contained page
report.md        the same without pictures
TABLE.csv        one per table, named by its title; the first table first
figures/*.svg    every heat map and line chart as a still picture
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from torchstone.report import finding_page, heatmap, line_plot
from torchstone.report.finding import Finding
from torchstone.report.markup import Markup
from torchstone.report.result import Table
from torchstone.storage.atomic import atomic_write

FINDING, HTML, MARKDOWN, FIGURES = "finding.json", "report.html", "report.md", "figures"
RISKY = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for a formula at the start of a text


def write(finding: Finding, directory: Path) -> Path:
    """Write everything into `directory`; returns the path of `report.html`."""
    directory = Path(directory)
    (directory / FIGURES).mkdir(parents=True, exist_ok=True)
    data = json.dumps(finding.model_dump(mode="json"), ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write(directory / FINDING, data + "\n")
    for name, table in zip(_names([table.title for table in finding.tables]), finding.tables, strict=True):
        atomic_write(directory / f"{name}.csv", as_csv(table))
    drawn = [(one.title, heatmap.svg(one)) for one in finding.heatmaps]
    drawn += [(chart.title, line_plot.svg(chart)) for chart in finding_page.charts_of(finding)]
    for name, (_, picture) in zip(_names([title for title, _ in drawn]), drawn, strict=True):
        atomic_write(directory / FIGURES / f"{name}.svg", _standing_alone(picture))
    atomic_write(directory / MARKDOWN, finding_page.text(finding))
    atomic_write(directory / HTML, finding_page.page(finding))
    return directory / HTML


def as_csv(table: Table) -> str:
    """The table as CSV in full precision; text that a spreadsheet would run as a formula is quoted with an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_safe(column) for column in table.columns])
    for row in table.rows:
        writer.writerow(["" if value is None else _safe(value) for value in row])
    return stream.getvalue()


def _safe(value: str | float | int) -> str | float | int:
    return f"'{value}" if isinstance(value, str) and value.startswith(RISKY) else value


def _standing_alone(picture: Markup) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{picture}\n'


def _names(titles: list[str]) -> list[str]:
    """File names made of titles, all different."""
    names: list[str] = []
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "table"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names
