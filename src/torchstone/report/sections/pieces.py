"""Pieces that several sections use: headings, badges, tables, names, fact lists."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.report import numbers
from torchstone.report.markup import Child, Markup, element
from torchstone.report.tables import Grid

TALL = 30  # rows from which a table scrolls in its box
PATHS = {
    "holds": "M4 8.5 7 11.5 12.5 5",
    "fails": "M4.8 4.8 11.2 11.2M11.2 4.8 4.8 11.2",
    "inconclusive": "M4 8H12",
}


def section(identifier: str, heading: str, *children: Child) -> Markup:
    """A numbered-free section with its heading as the accessible name."""
    title = element("h2", heading, id=f"{identifier}-title")
    return element("section", title, *children, id=identifier, aria_labelledby=f"{identifier}-title")


def badge(status: str) -> Markup:
    """A verdict as icon and word; the colour only repeats it."""
    icon = element(
        "svg", element("path", d=PATHS[status]), viewBox="0 0 16 16", width=14, height=14, aria_hidden="true"
    )
    return element("span", icon, status, class_=f"badge {status}")


def arm_name(name: str, color: int) -> Markup:
    """An arm's name beside its colour."""
    return element("span", swatch(color), element("bdi", name), class_="arm-name")


def swatch(color: int) -> Markup:
    """A short stroke in the colour of an arm; beyond the palette the strokes are dashed."""
    return element("span", class_=f"swatch arm-{color % 8}{' dotted' if color >= 8 else ''}", aria_hidden="true")


def facts(*pairs: tuple[str, Child], wide: bool = False) -> Markup | None:
    """A list of terms and values, side by side or `wide`; pairs whose value is None are left out."""
    items = [element("div", element("dt", term), element("dd", value)) for term, value in pairs if value is not None]
    return element("dl", items, class_="facts wide" if wide else "facts") if items else None


def grid(table: Grid, label: str, colors: dict[str, int] | None = None, where: str = "result.json") -> Markup:
    """A table that scrolls inside its own box. With `colors`, the first column holds arm names; `where` has all rows."""
    heads = [
        element("th", head, scope="col", class_="num" if numeric else None)
        for head, numeric in zip(table.columns, table.numeric, strict=True)
    ]
    rows = [_row(row, table.numeric, colors) for row in table.rows]
    body = element("table", element("thead", element("tr", heads)), element("tbody", rows))
    cut = element("p", f"{table.cut:,} more rows are in {where}.", class_="note") if table.cut else None
    tall = " tall" if len(rows) > TALL else ""
    box = element("div", body, class_=f"scroll{tall}", role="region", tabindex=0, aria_label=label)
    return element("div", box, cut, class_="table")


def _row(row: Sequence[str], numeric: Sequence[bool], colors: dict[str, int] | None) -> Markup:
    cells = []
    for index, (value, is_number) in enumerate(zip(row, numeric, strict=True)):
        shown = _with_aside(numbers.typeset(value)) if is_number else value
        if index == 0 and colors is not None:
            cells.append(element("th", arm_name(value, colors.get(value, 0)), scope="row"))
        else:
            cells.append(element("td", shown, class_="num" if is_number else None))
    return element("tr", cells)


def _with_aside(value: str) -> Child:
    first, _, aside = value.partition("\n")
    return [first, element("small", aside)] if aside else first


def details(summary: Child, *children: Child, open_: bool = False) -> Markup:
    """Something folded away."""
    return element("details", element("summary", summary), *children, open=open_)
