"""Numbers behind the verdicts: measurements, costs, the study's tables, the paper's figures, and every
cell."""

from __future__ import annotations

from torchstone.report import tables
from torchstone.report.charts import MANY_CELLS, arm_colors
from torchstone.report.markup import Markup, element
from torchstone.report.result import Result
from torchstone.report.sections.pieces import details, grid, section
from torchstone.report.tables import Grid

MOST_ERRORS = 40
ERROR_LENGTH = 6000


def measurements(result: Result) -> Markup | None:
    """Arms × metrics."""
    table = tables.measurements(result)
    if table is None:
        return None
    note = element(
        "p",
        "Mean ± standard deviation over finished cells. An arrow says which direction is better.",
        class_="note",
    )
    return section("measurements", "Measurements", grid(table, "Measurements", arm_colors(result)), note)


def study_tables(result: Result) -> Markup | None:
    """Tables that the study made."""
    if not result.tables:
        return None
    parts = []
    for table in result.tables:
        parts.append(element("h3", table.title))
        parts.append(grid(tables.of_table(table), table.title))
        if table.note:
            parts.append(element("p", table.note, class_="note"))
    return section("tables", "Tables", parts)


def costs(result: Result) -> Markup | None:
    """What each arm cost."""
    table = tables.costs(result)
    if table is None:
        return None
    note = element("p", "Means over finished cells; in brackets the ratio to the baseline.", class_="note")
    return section("costs", "Costs", grid(table, "Costs", arm_colors(result)), note)


def paper(result: Result) -> Markup | None:
    """The paper's numbers beside ours."""
    if not result.paper:
        return None
    rows = tuple((figure.setting, figure.paper or "–", figure.ours or "–", figure.note) for figure in result.paper)
    table = Grid(("setting", "paper", "ours", "note"), rows, (False,) * 4)
    note = element("p", "The paper's scale differs from ours unless a row says otherwise.", class_="note")
    return section("paper", "The paper’s figures beside ours", grid(table, "The paper's figures"), note)


def cells(result: Result) -> Markup | None:
    """Every cell; failures in full, above the table."""
    if not result.cells:
        return None
    table = grid(tables.cells(result), "Cells", arm_colors(result))
    if len(result.cells) > MANY_CELLS:
        table = details(f"All {len(result.cells):,} cells", table)
    return section("cells", "Cells", _failures(result), table)


def _failures(result: Result) -> Markup | None:
    failures = tables.failures(result)
    if not failures:
        return None
    parts = []
    for who, error in failures[:MOST_ERRORS]:
        shown = error
        if len(error) > ERROR_LENGTH:
            shown = f"{error[: ERROR_LENGTH // 2]}\n[… the middle is in result.json …]\n{error[-ERROR_LENGTH // 2 :]}"
        parts.append(element("div", element("h3", who), element("pre", shown, tabindex=0), class_="failure"))
    if len(failures) > MOST_ERRORS:
        parts.append(element("p", f"{len(failures) - MOST_ERRORS} more errors are in result.json.", class_="note"))
    return element("div", parts, class_="failures")
