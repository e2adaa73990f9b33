"""The shell of every page: one HTML file that needs nothing else.

Security: a content security policy admits exactly two scripts (the vendored chart library and
`assets/report.js`) and one style sheet, each by its SHA-256, and nothing else: no request, no form, no inline
handler. The page's data are JSON blocks, which are not scripts. Every string goes through `markup.element`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from torchstone.report.charts import Chart
from torchstone.report.markup import Child, Markup, clean, data_block, element, join

MOST_BYTES = 2_000_000
MOST_NUMBERS = 300_000
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


def document(
    title: str,
    masthead: Child,
    sections: Sequence[tuple[str, str, Markup | None]],
    charts: Sequence[Chart],
    numbers: dict[str, Any],
) -> str:
    """A whole page.

    Args:
        title: of the window.
        masthead: what stands above the navigation.
        sections: identifier, name in the navigation, and content; those without content are left out.
        charts: drawn by the script, in the order of their `data-chart` numbers.
        numbers: what the page shows, as data to save; left out where it is large.
    """
    present = [(identifier, name, content) for identifier, name, content in sections if content is not None]
    body = element(
        "body",
        element("a", "Skip to the content", href="#main", class_="skip"),
        masthead,
        navigation([(identifier, name) for identifier, name, _ in present]),
        element("main", [content for _, _, content in present], id="main"),
        element(
            "footer",
            "Made by torchstone. This file holds all that it shows and asks the network for nothing.",
        ),
        _data(charts, numbers),
        _script("vendor/uPlot.iife.min.js"),
        _script("assets/report.js"),
    )
    return f"<!doctype html>\n{element('html', _head(title), body, lang='en')}\n"


def navigation(sections: Sequence[tuple[str, str]]) -> Markup:
    """Links to the sections that exist."""
    links = [element("li", element("a", name, href=f"#{identifier}")) for identifier, name in sections]
    return element("nav", element("ul", links), aria_label="Sections", class_="sections")


def _script(name: str) -> Markup:
    return element("script", asset(name))


def _styles() -> Markup:
    return Markup(f"{asset('vendor/uPlot.min.css')}\n{asset('assets/report.css')}")


def _head(title: str) -> Markup:
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
        element("title", f"{clean(title)} · torchstone"),
        element("link", rel="icon", href=NO_ICON),
        element("style", _styles()),
    )


def _data(charts: Sequence[Chart], numbers: dict[str, Any]) -> Markup:
    payload: dict[str, Any] = {"charts": [_cleaned(chart.payload()) for chart in charts]}
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
