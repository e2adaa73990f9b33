"""The page and the Markdown of a finding: what one analysis of one model found, next to its control."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.report import heatmap, markdown, numbers, tables, token_texts
from torchstone.report.charts import Chart, Detail, figure_charts
from torchstone.report.finding import Finding, Heatmap, TokenText
from torchstone.report.markup import Markup, element
from torchstone.report.result import PaperFigure, Table
from torchstone.report.sections import charts as chart_sections
from torchstone.report.sections.pieces import details, facts, grid, section
from torchstone.report.shell import MOST_BYTES, document
from torchstone.report.tables import Grid

DETAILS = (Detail(400, False), Detail(100, False), Detail(40, False))
MOST_CELLS_IN_TABLE = 1600
MOST_CELLS_DRAWN = 12_000
WHERE = "the CSV file"


def page(finding: Finding) -> str:
    """The whole report as HTML text, with as much detail of the curves as fits."""
    text = ""
    for detail in DETAILS:
        text = _page(finding, detail)
        if len(text.encode()) <= MOST_BYTES:
            break
    return text


def _page(finding: Finding, detail: Detail) -> str:
    charts = figure_charts(finding.figures, {}, detail)
    sections = [
        ("control", "Control", _control(finding)),
        ("heatmaps", "Maps", _heatmaps(finding.heatmaps)),
        ("figures", "Figures", chart_sections.figures(charts, 0)),
        ("texts", "Texts", _texts(finding.token_texts)),
        ("tables", "Tables", _tables(finding.tables)),
        ("paper", "Paper", _paper(finding.paper)),
        ("about", "About", _about(finding)),
    ]
    return document(finding.title, _masthead(finding), sections, charts, finding.model_dump(mode="json"))


def charts_of(finding: Finding) -> list[Chart]:
    """The finding's line charts in full detail."""
    return figure_charts(finding.figures, {}, DETAILS[0])


def _masthead(finding: Finding) -> Markup:
    created = finding.created[:16].replace("T", " ") + (" UTC" if "T" in finding.created else "")
    return element(
        "header",
        element("p", element("span", "torchstone", class_="wordmark"), " analysis ", element("b", finding.analysis),
                class_="eyebrow"),
        element("h1", finding.title),
        element("p", finding.question, class_="question"),
        element("div", element("p", numbers.typeset(finding.answer)), class_="summary"),
        facts(("model", element("bdi", finding.subject)), ("created", created if finding.created else None)),
        class_="masthead",
    )  # fmt: skip


def _control(finding: Finding) -> Markup:
    return section("control", "What it is compared with", element("p", finding.control))


def _heatmaps(maps: Sequence[Heatmap]) -> Markup | None:
    if not maps:
        return None
    return section("heatmaps", "Maps", [_heatmap(one, f"map-{index}") for index, one in enumerate(maps)])


def _heatmap(one: Heatmap, identifier: str) -> Markup:
    cells = len(one.x) * len(one.y)
    drawn = (
        heatmap.svg(one)
        if cells <= MOST_CELLS_DRAWN
        else element("p", f"{cells:,} cells are too many to draw; {WHERE} has them.")
    )
    table = details("As a table", grid(_as_grid(one), one.title)) if cells <= MOST_CELLS_IN_TABLE else None
    caption = element("figcaption", one.note) if one.note else None
    return element("figure", element("h3", one.title), drawn, caption, table, class_="chart", id=identifier)


def _as_grid(one: Heatmap) -> Grid:
    columns = (one.y_label, *(_label(value) for value in one.x))
    rows = tuple(
        (_label(name), *(numbers.number(value) for value in row)) for name, row in zip(one.y, one.values, strict=True)
    )
    return Grid(columns, rows, (False, *[True] * len(one.x)))


def _label(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _texts(texts: Sequence[TokenText]) -> Markup | None:
    if not texts:
        return None
    return section("texts", "Texts", token_texts.section_of(texts, WHERE))


def _tables(every: Sequence[Table]) -> Markup:
    parts = []
    for table in every:
        parts += [element("h3", table.title), grid(tables.of_table(table), table.title, where=WHERE)]
        if table.note:
            parts.append(element("p", table.note, class_="note"))
    return section("tables", "Tables", parts)


def _paper(figures: Sequence[PaperFigure]) -> Markup | None:
    if not figures:
        return None
    return section("paper", "The paper’s figures beside these", grid(_paper_grid(figures), "The paper's figures"))


def _paper_grid(figures: Sequence[PaperFigure]) -> Grid:
    rows = tuple((figure.setting, figure.paper or "–", figure.ours or "–", figure.note) for figure in figures)
    return Grid(("setting", "paper", "this model", "note"), rows, (False,) * 4)


def _about(finding: Finding) -> Markup:
    notes = [element("li", note) for note in finding.notes]
    command = (
        element("pre", element("code", finding.command), tabindex=0, class_="command") if finding.command else None
    )
    rows = tuple(finding.environment.items())
    return section(
        "about",
        "About this finding",
        [element("h3", "Small print"), element("ul", notes, class_="notes")] if notes else None,
        element("div", element("h3", "Run it again"), command,
                element("p", "The same numbers are in ", element("a", "finding.json", href="./finding.json"), " and, one file a "
                        "table, as CSV beside this page."),
                element("button", "Save numbers as JSON", type="button", id="download", hidden=True), class_="again"),
        details("Environment", grid(Grid(("what", "value"), rows, (False, False)), "Environment")) if rows else None,
    )  # fmt: skip


def text(finding: Finding) -> str:
    """The finding as Markdown, without its pictures."""
    parts = [
        f"# {markdown.escape(finding.title)}",
        markdown.escape(finding.question),
        f"**{markdown.escape(finding.answer)}**",
        f"Model: {markdown.escape(finding.subject)}",
        f"Control: {markdown.escape(finding.control)}",
    ]
    for table in finding.tables:
        parts += [
            f"## {markdown.escape(table.title)}",
            markdown.grid(tables.of_table(table)).replace("result.json", "finding.json"),
        ]
        if table.note:
            parts.append(markdown.escape(table.note))
    for one in finding.token_texts:
        marked = sum(span.marked for span in one.spans)
        words = token_texts.marked_words(one)
        parts += [f"## {markdown.escape(one.title)}", f"{marked:,} of {len(one.spans):,} tokens are marked: "
                  f"{markdown.escape(one.mark_label)}." + (f" The largest by {markdown.escape(one.value_label)}: "
                  f"{markdown.escape(words)}." if words else "")]  # fmt: skip
    if finding.paper:
        parts += ["## The paper's figures beside these", markdown.grid(_paper_grid(finding.paper))]
    parts += [f"- {markdown.escape(note)}" for note in finding.notes]
    if finding.command:
        parts += ["## Run it again", markdown.block(finding.command)]
    return "\n\n".join(parts) + "\n"
