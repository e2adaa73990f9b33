"""Coloured texts in a real browser: colours on both sides of 0 in light and dark, marks, no messages, no overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from torchstone.report.finding import Finding, TokenSpan, TokenText
from torchstone.report.result import Table

Open = Callable[..., Any]
HOSTILE = "</script><img src=x onerror=alert(1)>"


def finding(word: str = "token ") -> Finding:
    spans = tuple(TokenSpan(text=word, value=(i - 100) / 50, marked=i % 3 == 0) for i in range(201))
    long = TokenSpan(text="x" * 500, value=1.0)
    one = TokenText(title=word, value_label=word, mark_label=word, spans=(*spans, long), note=word)
    table = Table(title="Main", columns=("a",), rows=((1,),))
    return Finding(analysis="score", title="Scores", question="Which?", subject="m", answer="These.", control="Random.",
                   tables=(table,), token_texts=(one,))  # fmt: skip


def colour(page: Any, selector: str) -> tuple[float, ...]:
    """Red, green and blue of a background, as painted on white or black paper."""
    return tuple(
        page.run(
            "const canvas = document.createElement('canvas'); const pen = canvas.getContext('2d');"
            "pen.fillStyle = getComputedStyle(document.body).backgroundColor; pen.fillRect(0, 0, 1, 1);"
            "pen.fillStyle = getComputedStyle(document.querySelector(arguments[0])).backgroundColor; pen.fillRect(0, 0, 1, 1);"
            "return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3)",
            selector,
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("word", ["token ", HOSTILE])
def test_colours_and_marks_are_painted(open_report: Open, scheme: str, word: str) -> None:
    page = open_report(finding(word), 1100, scheme)
    assert page.console() == []
    assert set(page.requests()) <= {page.path.as_uri(), "data:,"}
    up, down = colour(page, ".token-text .up-5"), colour(page, ".token-text .down-5")
    assert up[0] > up[2] + 30 and down[2] > down[0] + 30  # orange and blue
    assert colour(page, ".token-text .up-1") != up
    style = "return getComputedStyle(document.querySelector('.token-text .marked'))"
    assert int(page.run(f"{style}.fontWeight")) >= 700 and "underline" in page.run(f"{style}.textDecorationLine")
    assert page.run("return [...document.querySelectorAll('.token-text .up-5')].at(-1).title") == "2"
    shown = page.run("return document.querySelector('.token-text').textContent")
    assert shown == word * 201 + "x" * 500
    assert page.run("return document.images.length") == 0
    assert page.run("return [...document.querySelectorAll('nav a')].map((a) => a.textContent)").count("Texts") == 1


@pytest.mark.parametrize("width", [390, 1100])
def test_nothing_overflows(open_report: Open, width: int) -> None:
    page = open_report(finding(), width)
    assert page.run("return document.documentElement.scrollWidth") <= width
