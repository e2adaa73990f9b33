"""F23: hostile names, metrics and model output stay text in every report."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from torchstone import report
from torchstone.report import html, markdown
from torchstone.report.markup import element
from torchstone.report.result import Result
from torchstone.report.terminal import print_verdicts

BUILDERS = Path(__file__).parents[1] / "report" / "results.py"
ALLOWED = set(
    [
        "html",
        "head",
        "meta",
        "title",
        "link",
        "style",
        "body",
        "a",
        "header",
        "p",
        "span",
        "b",
        "h1",
        "h2",
        "h3",
        "div",
        "dl",
        "dt",
        "dd",
        "code",
        "nav",
        "ul",
        "li",
        "main",
        "section",
        "article",
        "svg",
        "path",
        "rect",
        "line",
        "circle",
        "text",
        "small",
        "bdi",
        "strong",
        "details",
        "summary",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
        "figcaption",
        "button",
        "pre",
        "footer",
        "script",
    ]
)


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_results", BUILDERS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Structure(HTMLParser):
    """The elements and attributes of a page, without its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.comments = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def check_page(page: str) -> None:
    structure = Structure(page)
    assert set(structure.tags) <= ALLOWED and structure.comments == 0
    assert structure.tags.count("script") <= 4 and structure.tags.count("style") == 1
    assert all(structure.tags.count(tag) == 1 for tag in ("html", "head", "body", "main", "h1"))
    for name, value in structure.attributes:
        assert not name.startswith("on") and name not in ("style", "src", "srcset", "action", "formaction")
        assert name not in ("href", "xlink:href") or not (value or "").strip().lower().startswith(
            ("javascript:", "http", "//")
        )


def no_control(text: str) -> bool:
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") for c in text)


def test_hostile_strings_add_nothing_to_the_page(results: ModuleType) -> None:
    page = html.page(results.hostile())
    check_page(page)
    assert page.count("<script") == 4 and page.count("</script>") == 4
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    assert no_control(body)
    assert "&lt;script&gt;window.hacked=1&lt;/script&gt;" in body


def test_the_data_blocks_hold_no_markup(results: ModuleType) -> None:
    page = html.page(results.hostile())
    blocks = re.findall(r'<script type="application/json" id="[a-z-]+">(.*?)</script>', page, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        assert not set(block) & set("<>&\u2028\u2029")
        json.loads(block)


def test_markdown_has_no_html_and_no_links_of_others(results: ModuleType) -> None:
    text = markdown.page(results.hostile())
    assert no_control(text)
    prose = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text, flags=re.S | re.M)
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    allowed = ("<details><summary>Recipe</summary>", "</details>")
    for tag in allowed:
        prose = prose.replace(tag, "")
    assert "<" not in prose
    assert not re.search(r"(?<!\\)\]\(", prose)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_gets_no_sequence_from_data(results: ModuleType, terminal: bool) -> None:
    stream = io.StringIO()
    print_verdicts(
        results.hostile(),
        None,
        Console(file=stream, force_terminal=terminal, color_system="standard" if terminal else None),
    )
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()) if terminal else stream.getvalue()
    assert no_control(text) and "\x1b" not in text


def test_written_files_are_readable_again(results: ModuleType, tmp_path: Path) -> None:
    result = results.hostile()
    report.write(result, tmp_path)
    assert report.load(tmp_path) == result


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=6, max_size=6))
def test_any_string_stays_text(results: ModuleType, texts: list[str]) -> None:
    base = results.study(arms=2, seeds=2, points=5).model_dump(mode="json")
    names = {"attention": texts[0], "differential": texts[1] + "'"}
    base.update(
        title=texts[2],
        question=texts[3],
        notes=texts,
        baseline=names["attention"],
        environment={texts[4]: texts[5]},
    )
    for entry in (*base["arms"], *base["cells"], *base["verdicts"]):
        for key in ("name", "arm", "baseline"):
            if key in entry:
                entry[key] = names[entry[key]]
    for cell in base["cells"]:
        cell["series"] = {texts[4]: next(iter(cell["series"].values()))}
    result = Result.model_validate(base)
    page = html.page(result)
    check_page(page)
    assert element("h1", texts[2]) in page
    markdown.page(result)
