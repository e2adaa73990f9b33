"""The HTML builder: text stays text, and what a report never needs is refused."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.report.markup import clean, data_block, element, join


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


@given(st.text())
def test_any_text_survives_as_text(text: str) -> None:
    reader = read(element("p", text, title=text))
    assert reader.tags == ["p"]
    assert reader.text == clean(text)
    assert reader.attributes == [("title", clean(text))]


@given(st.text())
def test_json_block_cannot_be_closed_from_inside(text: str) -> None:
    block = data_block("data", {"name": text, text: [text]})
    inside = block.split(">", 1)[1].rsplit("<", 1)[0]
    assert not set(inside) & set("<>&\u2028\u2029")
    assert json.loads(inside) == {"name": text, text: [text]}


def test_numbers_that_are_not_finite_are_refused_in_data() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        data_block("data", float("nan"))


def test_nested_children_and_void_elements() -> None:
    assert element("ul", [element("li", "a"), None, [element("li", 2)]]) == "<ul><li>a</li><li>2</li></ul>"
    assert join("<", element("br"), ">") == "&lt;<br>&gt;"
    assert element("details", open_=True, class_="x", hidden=False) == '<details open class="x"></details>'


@pytest.mark.parametrize("name", ["onclick", "onload", "style"])
def test_handlers_and_styles_are_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="not for reports"):
        element("p", **{name: "x"})


@pytest.mark.parametrize("link", ["javascript:alert(1)", "https://example.org", "//example.org", "file:///etc/passwd"])
def test_links_out_of_the_folder_are_refused(link: str) -> None:
    with pytest.raises(AssertionError, match="inside the report"):
        element("a", "x", href=link)


def test_direction_marks_and_control_characters_go() -> None:
    assert clean("a\u202eb\x1b[31m\x00\u2066c\r\nd\te") == "abc\nd    e"
