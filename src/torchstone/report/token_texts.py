"""Texts whose tokens are coloured by a number, some of them marked: part of a finding's page.

Colours come in a few steps on both sides of 0, as classes of the style sheet, because the page's security policy admits no style
of its own on an element. Blue is below 0, orange above; marked tokens are bold and underlined, so that colour is never the only
sign. Pointing at a token shows its number.

A page holds at most `MOST_SPANS` tokens and `MOST_MARKUP` bytes of all texts together; what is left out is counted beside the
text, and the CSV file has every token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.report import numbers
from torchstone.report.finding import TokenSpan, TokenText
from torchstone.report.markup import Markup, element, join
from torchstone.report.result import Table

STEPS = 5  # colours on either side of 0
MOST_SPANS = 8000
MOST_MARKUP = 800_000
SHORT = 400  # tokens up to which a text is shown open
CELL = 200  # characters of a token in a table


def section_of(texts: Sequence[TokenText], where: str) -> list[Markup]:
    """The texts with their legends, the first ones whole, the rest as far as the page allows.

    Args:
        texts: in order.
        where: which file has all tokens.
    """
    parts, spans_left, bytes_left = [], MOST_SPANS, MOST_MARKUP
    for index, text in enumerate(texts):
        drawn = _spans(text, spans_left, bytes_left)
        spans_left -= len(drawn)
        bytes_left -= sum(map(len, drawn))
        parts.append(_text(text, drawn, f"text-{index}", where))
    return parts


def _text(text: TokenText, drawn: list[Markup], identifier: str, where: str) -> Markup:
    total, marked = len(text.spans), sum(span.marked for span in text.spans)
    scale = scale_of(text)
    left = total - len(drawn)
    cut = f"The first {len(drawn):,} of {total:,} tokens are shown; {where} has all." if left else None
    return element(
        "figure",
        element("h3", text.title),
        element("p", f"{marked:,} of {total:,} tokens are marked: {text.mark_label}.", class_="note"),
        _legend(text, scale),
        element(
            "div", drawn, class_="token-text tall" if len(drawn) > SHORT else "token-text", tabindex=0, role="region",
            aria_label=text.title,
        ),
        element("p", cut, class_="note") if cut else None,
        element("p", text.note, class_="note") if text.note else None,
        id=identifier,
        class_="tokens",
    )  # fmt: skip


def _spans(text: TokenText, most: int, most_bytes: int) -> list[Markup]:
    """The first spans of a text, as many as may be drawn."""
    scale, drawn, used = scale_of(text), [], 0
    for span in text.spans[: max(0, most)]:
        one = _span(span, scale)
        used += len(one)
        if used > most_bytes:
            break
        drawn.append(one)
    return drawn


def _span(span: TokenSpan, scale: float) -> Markup:
    classes = [name for name in (step_of(span.value, scale), "marked" if span.marked else "") if name]
    title = None if span.value is None else f"{span.value:.4g}"
    return element("mark" if span.marked else "span", span.text, class_=" ".join(classes) or None, title=title)


def scale_of(text: TokenText) -> float:
    """The number that has the strongest colour: exceeded by one in fifty at most, so that single extremes do not wash out the
    rest."""
    values = sorted(abs(span.value) for span in text.spans if span.value is not None)
    return values[min(len(values) - 1, int(0.98 * len(values)))] if values else 0.0


def step_of(value: float | None, scale: float) -> str:
    """The class of a number: `up-1` … `up-5` above 0, `down-1` … below; empty for none and for what is near 0."""
    if value is None or not scale:
        return ""
    step = min(STEPS, int(abs(value) / scale * (STEPS + 0.5) + 0.5))
    return f"{'up' if value > 0 else 'down'}-{step}" if step else ""


def _legend(text: TokenText, scale: float) -> Markup:
    """The colours from the least to the greatest number."""
    steps = [f"down-{n}" for n in range(STEPS, 0, -1)] + [""] + [f"up-{n}" for n in range(1, STEPS + 1)]
    swatches = [element("span", class_=f"step {step}".strip(), aria_hidden="true") for step in steps]
    return element(
        "p",
        element("span", text.value_label, class_="what"),
        element("span", numbers.typeset(f"{-scale:.3g}")),
        element("span", join(*swatches), class_="steps"),
        element("span", numbers.typeset(f"{scale:.3g}")),
        element("mark", "marked", class_="marked"),
        class_="token-legend",
    )


def as_table(text: TokenText) -> Table:
    """Every token with its number and mark, for the CSV file."""
    rows = tuple((index, span.text, span.value, int(span.marked)) for index, span in enumerate(text.spans))
    return Table(title=f"Tokens of {text.title}", columns=("token", "text", text.value_label, "marked"), rows=rows)


def marked_words(text: TokenText, most: int = 20) -> str:
    """The marked tokens with the greatest numbers, whatever their sign, in words, for a page without colours."""
    found = sorted((span for span in text.spans if span.marked), key=lambda span: -abs(span.value or 0.0))[:most]
    return ", ".join(
        f"{span.text.strip()[:CELL]!r}" + (f" {span.value:.3g}" if span.value is not None else "") for span in found
    )
