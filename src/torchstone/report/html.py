"""The HTML report of a result. The shell around it, and what makes it safe, is in `torchstone.report.shell`.

Size: curves are embedded with less and less detail until the file is within `MOST_BYTES`; everything else on
the page is bounded by the number of rows and characters that its section shows.
"""

from __future__ import annotations

from torchstone.report import charts
from torchstone.report.charts import Detail
from torchstone.report.result import Result
from torchstone.report.sections import arms, colophon, evidence, verdicts
from torchstone.report.sections import charts as chart_sections
from torchstone.report.shell import MOST_BYTES, document

DETAILS = (Detail(400, True), Detail(200, True), Detail(200, False), Detail(100, False), Detail(40, False))


def page(result: Result) -> str:
    """The whole report as HTML text of at most `MOST_BYTES` bytes."""
    details = [detail for detail in DETAILS[:-1] if charts.estimated_bytes(result, detail) < 1.2 * MOST_BYTES]
    if len(result.cells) > charts.MANY_CELLS:
        details = [detail for detail in details if not detail.seeds]
    text = ""
    for detail in (*details, DETAILS[-1]):
        text = _page(result, detail)
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def _page(result: Result, detail: Detail) -> str:
    curves, figures = charts.curves(result, detail), charts.figures(result, detail)
    sections = [
        ("verdicts", "Verdicts", verdicts.verdicts(result)),
        ("effects", "Effects", verdicts.effects(result)),
        ("arms", "Arms", arms.arms(result)),
        (
            "curves",
            "Curves",
            chart_sections.curves(curves, cut=len(charts.curve_names(result)) - charts.MOST_CURVES),
        ),
        ("measurements", "Measurements", evidence.measurements(result)),
        ("figures", "Figures", chart_sections.figures(figures, len(curves))),
        ("tables", "Tables", evidence.study_tables(result)),
        ("paper", "Paper", evidence.paper(result)),
        ("costs", "Costs", evidence.costs(result)),
        ("cells", "Cells", evidence.cells(result)),
        ("about", "About", colophon.about(result)),
    ]
    numbers = result.model_dump(mode="json", exclude={"cells": {"__all__": {"series"}}})
    return document(result.title, colophon.masthead(result), sections, [*curves, *figures], numbers)
