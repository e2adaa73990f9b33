"""Labels of ticks tell neighbours apart, also where a curve hardly moves."""

from __future__ import annotations

import re

import pytest

from torchstone.report.charts import Chart, ChartLine
from torchstone.report.line_plot import svg


@pytest.mark.parametrize("low, high", [(6.2425, 6.2441), (0.0, 8.0), (100_000.0, 100_030.0)])
def test_labels_of_neighbouring_ticks_differ(low: float, high: float) -> None:
    line = ChartLine(name="run", color=1, x={"step": [0.0, 1.0]}, y=[low, high])
    drawn = str(svg(Chart(title="Loss", axes=[("step", "step")], y_label="loss", lines=[line])))
    labels = re.findall(r'text-anchor="end"[^>]*>([^<]+)<', drawn)
    assert len(labels) >= 3 and len(set(labels)) == len(labels)
