"""Coloured texts: every string escaped, colours mirrored around 0, marks, bounds, tables."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from torchstone.report import token_texts
from torchstone.report.finding import Finding, TokenSpan, TokenText
from torchstone.report.finding_page import page, text
from torchstone.report.finding_write import write
from torchstone.report.result import Table
from torchstone.report.shell import MOST_BYTES, asset
from torchstone.report.token_texts import MOST_SPANS, STEPS, scale_of, step_of

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x1b[31m\"' &amp;"


def token_text(spans: list[TokenSpan], **changes: str) -> TokenText:
    given = {"title": "Text", "value_label": "excess (nats)", "mark_label": "selected", "note": "A note."}
    return TokenText(**{**given, **changes}, spans=tuple(spans))


def finding(*texts: TokenText) -> Finding:
    table = Table(title="Main", columns=("a",), rows=((1,),))
    return Finding(analysis="score", title="Scores", question="Which?", subject="m", answer="These.", control="Random.",
                   tables=(table,), token_texts=texts)  # fmt: skip


class Drawn(HTMLParser):
    """The elements of coloured texts: (tag, classes, title, text)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[list[str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._inside = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        given = dict(attrs)
        if "token-text" in (given.get("class") or "").split():
            self._inside = 1
        elif self._inside:
            self._inside += 1
            self.found.append([tag, given.get("class") or "", given.get("title") or "", ""])

    def handle_endtag(self, tag: str) -> None:
        self._inside = max(0, self._inside - 1)

    def handle_data(self, data: str) -> None:
        if self._inside > 1:
            self.found[-1][3] += data


def drawn(*texts: TokenText) -> list[list[str]]:
    return Drawn(page(finding(*texts))).found


def test_tokens_have_their_colour_number_and_mark() -> None:
    values = [-2.0, -1.0, 0.0, 1.0, 2.0, None]
    spans = [TokenSpan(text=f"t{i}\n", value=value, marked=i > 3) for i, value in enumerate(values)]
    assert drawn(token_text(spans)) == [
        ["span", "down-5", "-2", "t0\n"],
        ["span", "down-3", "-1", "t1\n"],
        ["span", "", "0", "t2\n"],
        ["span", "up-3", "1", "t3\n"],
        ["mark", "up-5 marked", "2", "t4\n"],
        ["mark", "marked", "", "t5\n"],
    ]


@pytest.mark.parametrize("value", [0.01, 0.3, 1.0, 5.0, 1e9])
def test_colours_mirror_around_zero_and_grow(value: float) -> None:
    up, down = step_of(value, 1.0), step_of(-value, 1.0)
    assert up.replace("up", "down") == down
    assert int((up or "up-0")[-1]) <= int((step_of(2 * value, 1.0) or "up-0")[-1]) <= STEPS
    assert step_of(None, 1.0) == step_of(0.0, 1.0) == step_of(value, 0.0) == ""


def test_the_style_sheet_has_every_class_and_the_page_no_style_of_its_own() -> None:
    sheet = asset("assets/report.css")
    for step in range(1, STEPS + 1):
        assert f".up-{step} " in sheet and f".down-{step} " in sheet
    found = Drawn(page(finding(token_text([TokenSpan(text="a", value=1.0, marked=True)]))))
    assert "style" not in found.attributes and not any(name.startswith("on") for name in found.attributes)


def test_one_extreme_does_not_wash_out_the_rest() -> None:
    spans = [TokenSpan(text="a", value=float(i % 10)) for i in range(99)] + [TokenSpan(text="b", value=1e6)]
    assert scale_of(token_text(spans)) == 9
    assert scale_of(token_text([TokenSpan(text="a")])) == 0


def test_hostile_strings_stay_text() -> None:
    one = token_text(
        [TokenSpan(text=HOSTILE, value=1.0, marked=True)],
        title=HOSTILE,
        value_label=HOSTILE,
        mark_label=HOSTILE,
        note=HOSTILE,
    )
    html = page(finding(one))
    found = Drawn(html)
    assert "img" not in found.tags and "onerror" not in found.attributes
    assert "\x1b" not in html and "\u202e" not in html
    assert found.found == [["mark", "up-5 marked", "1", "</script><img src=x onerror=alert(1)>\"' &amp;"]]


def test_the_page_is_bounded_and_says_what_it_leaves_out() -> None:
    long = [TokenSpan(text=f"word{i} ", value=float(i % 7) - 3, marked=i % 2 == 0) for i in range(40_000)]
    html = page(finding(token_text(long, title="First"), token_text(long, title="Second")))
    assert len(html.encode()) < MOST_BYTES
    assert len(Drawn(html).found) == MOST_SPANS
    assert f"The first {MOST_SPANS:,} of 40,000 tokens are shown; the CSV file has all." in html
    assert "The first 0 of 40,000 tokens are shown" in html
    huge = [TokenSpan(text="x" * 300_000, value=1.0)] * 20
    assert len(page(finding(token_text(huge))).encode()) < MOST_BYTES


def test_files_and_markdown_have_every_token(tmp_path: Path) -> None:
    spans = [
        TokenSpan(text="=a", value=0.5),
        TokenSpan(text="b|", value=2.0, marked=True),
        TokenSpan(text="c", marked=True),
    ]
    first, second = token_text(spans), token_text(spans[:2])
    write(finding(first, second), tmp_path)
    rows = (tmp_path / "tokens-of-text.csv").read_text().splitlines()
    assert rows[0] == "token,text,excess (nats),marked" and rows[1:] == ["0,'=a,0.5,0", "1,b|,2.0,1", "2,c,,1"]
    assert len(list(tmp_path.glob("tokens-of-text*.csv"))) == 2
    written = text(finding(first))
    assert "2 of 3 tokens are marked: selected" in written and re.search(r"'b\\?\|' 2", written)
    write(finding(), tmp_path)
    assert not list(tmp_path.glob("tokens-of-text*.csv")) and "Texts" not in page(finding())


def test_words_for_pages_without_colours_are_the_strongest_of_both_signs() -> None:
    spans = [TokenSpan(text=f"t{value}", value=value, marked=value != 9.0) for value in (1.0, -7.0, 3.0, 9.0, -0.5)]
    found = token_texts.marked_words(token_text([*spans, TokenSpan(text="none", marked=True)]), most=3)
    assert found == "'t-7.0' -7, 't3.0' 3, 't1.0' 1"


def test_round_trip() -> None:
    one = finding(token_text([TokenSpan(text="a\n", value=-0.25, marked=True), TokenSpan(text="é")]))
    assert Finding.model_validate_json(one.model_dump_json()) == one
    assert token_texts.as_table(one.token_texts[0]).rows == ((0, "a\n", -0.25, 1), (1, "é", None, 0))
