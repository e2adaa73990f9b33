"""Charts: loss curves and the study's figures, with a legend of buttons, a caption and the end values as a
table."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.report import numbers
from torchstone.report.charts import Chart, ChartLine
from torchstone.report.markup import Markup, element
from torchstone.report.sections.pieces import details, grid, section, swatch
from torchstone.report.tables import Grid

MOST_POINTS_IN_TABLE = 40
MANY_POINTS = 12


def curves(charts: Sequence[Chart], cut: int) -> Markup | None:
    """Curves of the cells: one chart per recorded quantity; `cut` counts those that are not drawn."""
    if not charts:
        return None
    seeds = max(line.seeds for chart in charts for line in chart.lines)
    band = " The band reaches from the smallest to the largest seed." if seeds > 1 else ""
    note = f"Lines are means over the seeds of an arm.{band} "
    parts = [_chart(chart, index, f"curve-{index}") for index, chart in enumerate(charts)]
    rest = element("p", f"{cut:,} more curves are in result.json.", class_="note") if cut > 0 else None
    return section("curves", "Curves", element("p", note, _hint(), class_="note"), parts, rest)


def figures(charts: Sequence[Chart], first: int) -> Markup | None:
    """The study's own figures; `first` is the index of the first one among all charts of the page."""
    if not charts:
        return None
    parts = [_chart(chart, first + index, f"figure-{index}") for index, chart in enumerate(charts)]
    return section("figures", "Figures", parts)


def _hint() -> Markup:
    return element(
        "span",
        "Click a name to hide it, double-click to see it alone; drag in the chart to zoom, double-click to reset.",
        class_="screen-only",
    )


def _chart(chart: Chart, index: int, identifier: str) -> Markup:
    legend = [_key(line, number) for number, line in enumerate(chart.lines)]
    description = f"{chart.title} against {chart.axes[0][1]}. {_ends(chart)}"
    plot = element("div", class_="plot", role="img", aria_label=numbers.typeset(description))
    return element(
        "figure",
        element("div", element("h3", chart.title), _controls(chart), class_="chart-head"),
        element("div", legend, class_="legend", role="group", aria_label=f"Lines of {chart.title}"),
        plot,
        element("figcaption", chart.note, " " if chart.note else None, _steep(chart)) if _captioned(chart) else None,
        details("As a table", _table(chart)),
        class_="chart",
        id=identifier,
        data_chart=index,
    )


def _captioned(chart: Chart) -> bool:
    return bool(chart.note) or chart.steep


def _steep(chart: Chart) -> Markup | None:
    if not chart.steep:
        return None
    return element("span", "The steep start is out of sight; “whole height” shows it.", class_="screen-only")


def _key(line: ChartLine, number: int) -> Markup:
    last = numbers.typeset(numbers.reading(line.last))
    return element(
        "button",
        swatch(line.color),
        element("bdi", line.name),
        element("span", last, class_="reading", data_rest=last),
        type="button",
        class_="key",
        data_line=number,
        aria_pressed="true",
    )


def _controls(chart: Chart) -> Markup:
    axes = [
        element(
            "button",
            label,
            type="button",
            data_axis=position,
            aria_pressed="true" if position == 0 else "false",
        )
        for position, (_, label) in enumerate(chart.axes)
    ]
    switches = []
    if chart.steep:
        switches.append(element("button", "whole height", type="button", data_toggle="whole", aria_pressed="false"))
    switches += [element("button", "log y", type="button", data_toggle="log", aria_pressed=_flag(chart.log_y))]
    if len(chart.lines[0].y if chart.lines else []) >= MANY_POINTS:
        switches.append(element("button", "last half", type="button", data_toggle="half", aria_pressed="false"))
    if any(line.members for line in chart.lines):
        switches.append(element("button", "single seeds", type="button", data_toggle="seeds", aria_pressed="false"))
    axis = element("div", axes, class_="switch", role="group", aria_label="Horizontal axis")
    return element("div", axis if len(axes) > 1 else None, element("div", switches, class_="switch"), class_="controls")


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _ends(chart: Chart) -> str:
    ends = [f"{line.name} ends at {numbers.reading(line.last)}" for line in chart.lines[:8]]
    return "; ".join(ends) + "."


def _table(chart: Chart) -> Markup:
    if len(chart.axes) == 1 and chart.axes[0][0] == "x":
        return grid(_points(chart), f"Points of {chart.title}")
    key, label = chart.axes[0]
    rows = []
    for line in chart.lines:
        at = next((x for x, y in zip(reversed(line.x[key]), reversed(line.y), strict=True) if y is not None), None)
        low, high = (_last(line.low), _last(line.high))
        rows.append((line.name, str(line.seeds), numbers.quantity(at), *map(numbers.number, (line.last, low, high))))
    columns = ("arm", "seeds", f"at ({label})", "last mean", "smallest", "largest")
    return grid(Grid(columns, tuple(rows), (False, True, True, True, True, True)), f"End values of {chart.title}")


def _last(values: list[float | None] | None) -> float | None:
    return next((value for value in reversed(values or []) if value is not None), None)


def _points(chart: Chart) -> Grid:
    every = sorted({x for line in chart.lines for x in line.x["x"] if x is not None})
    stride = max(1, -(-len(every) // MOST_POINTS_IN_TABLE))
    shown = every[::stride]
    lookups = [dict(zip(line.x["x"], line.y, strict=True)) for line in chart.lines]
    rows = tuple((numbers.number(x), *(numbers.number(known.get(x)) for known in lookups)) for x in shown)
    columns = (chart.axes[0][1], *(line.name for line in chart.lines))
    return Grid(columns, rows, (True,) * len(columns), cut=len(every) - len(shown))
