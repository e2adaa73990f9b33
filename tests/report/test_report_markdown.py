"""Markdown: complete, and everything from outside stays text."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.report import markdown


def table_rows(text: str) -> list[list[str]]:
    """Tables of a document as lists of cells, split at pipes that are not escaped."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]


def test_verdicts_and_failures_are_in(results: ModuleType) -> None:
    result = results.study()
    text = markdown.page(result)
    for verdict in result.verdicts:
        assert verdict.sentence in text
    for expected in (
        "✓ holds",
        "✗ fails",
        "? inconclusive",
        "NonFiniteError: loss is nan",
        "`344` → `336`",
        result.command,
        "About 11 seeds would decide it.",
        result.fingerprint,
    ):
        assert expected in text


@pytest.mark.parametrize("name", ["study", "algorithm", "nothing", "one-arm", "hostile"])
def test_tables_keep_their_shape(results: ModuleType, name: str) -> None:
    text = markdown.page(results.BUILDERS[name]())
    outside = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text, flags=re.S | re.M)
    for block in re.findall(r"(?:^\|.*\n)+", outside, flags=re.M):
        widths = {len(row) for row in table_rows(block)}
        assert len(widths) == 1


def test_numbers_are_not_escaped_but_lists_are() -> None:
    assert markdown.escape("-0.041 nats") == "-0.041 nats"
    assert markdown.escape("2.388") == "2.388"
    assert markdown.escape("1. item") == "1\\. item"
    assert markdown.escape("- item") == "\\- item"
    assert markdown.escape("a|b <i> [x](y) `c` *d*\ne") == "a\\|b &lt;i&gt; \\[x\\](y) \\`c\\` \\*d\\* e"


@given(st.text())
def test_code_blocks_cannot_be_closed_from_inside(text: str) -> None:
    lines = markdown.block(text).split("\n")
    fence = lines[0]
    assert lines[-1] == fence and set(fence) == {"`"}
    assert not any(line.lstrip().startswith(fence) for line in lines[1:-1])


@given(st.text())
def test_escaped_text_is_one_line_without_html(text: str) -> None:
    line = markdown.escape(text)
    assert "\n" not in line and "<" not in line and ">" not in line
    assert not re.search(r"(?<!\\)[\[\]`|]", line.replace("\\\\", ""))
