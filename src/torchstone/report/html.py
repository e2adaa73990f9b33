"""The HTML report: one file that needs nothing else.

Security: a content security policy admits exactly two scripts (the vendored chart library and
`assets/report.js`) and one style sheet, each by its SHA-256, and nothing else: no request, no form, no inline
handler. The report's data are JSON blocks, which are not scripts. Every string goes through `markup.element`.

Size: curves are embedded with less and less detail until the file is within `MOST_BYTES`; everything else on
the page is bounded by the number of rows and characters that its section shows.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from torchstone.report import charts
from torchstone.report.charts import Chart, Detail
from torchstone.report.markup import Markup, clean, data_block, element, join
from torchstone.report.result import Result
from torchstone.report.sections import arms, colophon, evidence, verdicts
from torchstone.report.sections import charts as chart_sections

MOST_BYTES = 2_000_000
MOST_NUMBERS = 300_000
DETAILS = (Detail(400, True), Detail(200, True), Detail(200, False), Detail(100, False), Detail(40, False))
NO_ICON = "data:,"  # keeps browsers from asking a server for one


@cache
def asset(name: str) -> Markup:
    """A style sheet or script of this package, as it stands in the page."""
    text = files("torchstone.report").joinpath(name).read_text(encoding="utf-8").strip()
    assert "</s" not in text, f"{name} could close its own element"
    return Markup(text)


def digest(text: str) -> str:
    """The SHA-256 source expression of a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
    present = [(identifier, name, body) for identifier, name, body in sections if body is not None]
    body = element(
        "body",
        element("a", "Skip to the content", href="#main", class_="skip"),
        colophon.masthead(result),
        colophon.navigation([(identifier, name) for identifier, name, _ in present]),
        element("main", [content for _, _, content in present], id="main"),
        element(
            "footer",
            "Made by torchstone. This file holds all that it shows and asks the network for nothing.",
        ),
        _data([*curves, *figures], result),
        _script("vendor/uPlot.iife.min.js"),
        _script("assets/report.js"),
    )
    return f"<!doctype html>\n{element('html', _head(result), body, lang='en')}\n"


def _script(name: str) -> Markup:
    return element("script", asset(name))


def _styles() -> Markup:
    return Markup(f"{asset('vendor/uPlot.min.css')}\n{asset('assets/report.css')}")


def _head(result: Result) -> Markup:
    scripts = " ".join(digest(asset(name)) for name in ("vendor/uPlot.iife.min.js", "assets/report.js"))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {digest(_styles())}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = {
        "viewport": "width=device-width, initial-scale=1",
        "color-scheme": "light dark",
        "referrer": "no-referrer",
    }
    # The policy has to be written raw: its quotes must not be escaped twice by a reader of the source.
    return element(
        "head",
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        [element("meta", name=name, content=content) for name, content in meta.items()],
        element("title", f"{clean(result.title)} · torchstone"),
        element("link", rel="icon", href=NO_ICON),
        element("style", _styles()),
    )


def _data(every: list[Chart], result: Result) -> Markup:
    payload: dict[str, Any] = {"charts": [_cleaned(chart.payload()) for chart in every]}
    numbers = result.model_dump(mode="json", exclude={"cells": {"__all__": {"series"}}})
    blocks = [data_block("report-data", payload)]
    whole = data_block("report-numbers", numbers)
    if len(whole) <= MOST_NUMBERS:
        blocks.append(whole)
    return join(blocks)


def _cleaned(data: Any) -> Any:
    """Strings inside chart data without control and direction characters."""
    if isinstance(data, str):
        return clean(data)
    if isinstance(data, dict):
        return {key: _cleaned(value) for key, value in data.items()}
    if isinstance(data, list) and data and isinstance(data[0], dict | str | list):
        return [_cleaned(value) for value in data]
    return data
