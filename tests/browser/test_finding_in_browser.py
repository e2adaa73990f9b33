"""The page of a finding in a real browser: maps, charts, no requests, hostile names, phones, dark mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from torchstone.report.finding import Finding, Heatmap
from torchstone.report.result import Figure, Line, Table

Open = Callable[..., Any]
HOSTILE = "</script><img src=x onerror=alert(1)>"


def finding(name: str = "rope-usage") -> Finding:
    values = tuple(tuple(float(r * 32 + c) for c in range(32)) for r in range(12))
    labels = tuple(f"{10 ** (-c / 8):.3g} rad ({6.28 * 10 ** (c / 8):.3g} tokens)" for c in range(32))
    usage = Heatmap(title=f"Usage {name}", x_label="frequency", y_label="layer", x=labels, y=tuple(map(str, range(12))),
                    values=values, unit="norm", note=name)  # fmt: skip
    line = Line(name=name, x=(64.0, 128.0, 256.0), y=(2.0, 1.5, 1.2), low=(1.9, 1.4, 1.1), high=(2.1, 1.6, 1.3))
    figure = Figure(title=f"Curve {name}", x_label="tokens", y_label="nats", log_x=True, lines=(line,))
    rows = tuple((layer, head, f"{name} {head}", layer / 7) for layer in range(12) for head in range(8))
    table = Table(title="Heads", columns=("layer", "head", "what", "share"), rows=rows)
    return Finding(analysis="rope-usage", title=name, question="Which?", subject=name, answer=name, control="Random weights.",
                   tables=(table,), heatmaps=(usage,), figures=(figure,), command=name)  # fmt: skip


@pytest.mark.parametrize("name", ["rope-usage", HOSTILE])
def test_maps_and_charts_are_drawn_without_console_messages_or_requests(open_report: Open, name: str) -> None:
    page = open_report(finding(name))
    assert page.console() == []
    assert set(page.requests()) <= {page.path.as_uri(), "data:,"}
    assert page.painted(0) > 10
    assert page.run("return document.querySelectorAll('.heatmap rect').length") >= 12 * 32
    fills = page.run(
        "return new Set([...document.querySelectorAll('.heatmap rect')].map((r) => r.getAttribute('fill'))).size"
    )
    assert fills > 50
    assert page.run("return document.images.length") == 0
    assert page.run("return document.querySelector('h1').textContent") == name


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1100, "dark")])
def test_nothing_overflows(open_report: Open, width: int, scheme: str) -> None:
    page = open_report(finding(), width, scheme)
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run("return document.querySelector('.tall').clientHeight") < 700
    page.click("#map-0 summary")
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.console() == []
