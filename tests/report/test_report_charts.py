"""Chart data: colours, bands, limits, log axes, empty series."""

from __future__ import annotations

import json
from types import ModuleType

from torchstone.report import charts
from torchstone.report.charts import Detail
from torchstone.report.result import CellRecord, Figure, Line, Series

FULL = Detail(400, True)


def test_arms_become_lines_with_bands_and_seeds(results: ModuleType) -> None:
    validation, train = charts.curves(results.study(), FULL)
    assert [line.name for line in train.lines] == ["attention", "differential", "differential-v2"]
    assert [key for key, _ in train.axes] == ["tokens", "flops", "seconds", "steps"]
    assert train.title == "Train loss" and validation.y_label == "validation loss (nats)"
    first, last = train.lines[0], train.lines[-1]
    assert len(first.members) == 3 and last.seeds == 2
    for y, low, high in zip(first.y, first.low, first.high, strict=True):
        assert low <= y <= high
    assert train.steep


def test_at_most_so_many_points_and_no_seeds_when_asked(results: ModuleType) -> None:
    chart = charts.curves(results.study(points=3000), Detail(50, False))[0]
    for line in chart.lines:
        assert len(line.y) == len(line.low) == len(line.x["seconds"]) <= 50
        assert line.members == []


def test_a_single_seed_has_no_band(results: ModuleType) -> None:
    chart = charts.curves(results.study(seeds=1), FULL)[0]
    assert all(line.low is None and line.high is None and not line.members for line in chart.lines)


def test_empty_series_give_no_chart(results: ModuleType) -> None:
    empty = CellRecord(arm="only", seed=0, status="done", series={"loss": Series(axes={}, values=())})
    assert charts.curves(results.comparison().model_copy(update={"cells": (empty,)}), FULL) == []
    assert charts.curves(results.comparison(), FULL) == []


def test_baseline_is_grey_and_figures_reuse_the_colours_of_arms(results: ModuleType) -> None:
    figure = charts.figures(results.study(), FULL)[0]
    assert {line.name: line.color for line in figure.lines} == {
        "differential": 1,
        "attention": 0,
        "shuffled labels": 2,
    }


def test_log_axes_leave_out_what_is_not_positive(results: ModuleType) -> None:
    line = Line(name="a", x=(4.0, 0.0, 2.0, 1.0), y=(4.0, 9.0, -2.0, None))
    figure = Figure(title="t", x_label="x", y_label="y", log_x=True, log_y=True, lines=(line,))
    drawn = charts.figures(results.comparison().model_copy(update={"figures": (figure,)}), FULL)[0].lines[0]
    assert drawn.x["x"] == [1, 2, 4] and drawn.y == [None, None, 4]


def test_a_line_without_points_is_kept_in_the_legend(results: ModuleType) -> None:
    figure = Figure(title="t", x_label="x", y_label="y", lines=(Line(name="none", x=(), y=()),))
    chart = charts.figures(results.comparison().model_copy(update={"figures": (figure,)}), FULL)[0]
    assert chart.lines[0].last is None and not chart.steep


def test_the_estimate_is_near_the_truth(results: ModuleType) -> None:
    for detail in (FULL, Detail(100, False)):
        result = results.study()
        real = len(json.dumps([chart.payload() for chart in charts.curves(result, detail)], separators=(",", ":")))
        assert 0.7 * real < charts.estimated_bytes(result, detail) < 1.4 * real
