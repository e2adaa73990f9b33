"""HTML from nested calls, with every string escaped.

    element("p", "5 < 6", class_="note")  ->  <p class="note">5 &lt; 6</p>

A child or an attribute value that is a plain `str` is text and is escaped; only the result of `element` (a
`Markup`) is taken as HTML. Control characters and marks that change the direction of text are removed first,
so that a hostile name can neither close a tag nor reorder the line it stands in.

`element` refuses what a report never needs and an attacker would want: inline handlers, `style` attributes
(the page's content security policy forbids both anyway) and links that lead out of the page's folder.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

from torchstone.storage.names import safe_text

VOID = frozenset({"br", "hr", "input", "link", "meta", "wbr"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]


def clean(text: str) -> str:
    """`text` without control and direction characters; line breaks stay, a tab becomes spaces."""
    lines = text.replace("\r\n", "\n").replace("\t", "    ").split("\n")
    return "\n".join(safe_text(line) for line in lines)


def escape(text: str) -> Markup:
    """`text` as HTML text or attribute value."""
    return Markup(html.escape(clean(text), quote=True))


def join(*children: Child) -> Markup:
    """Children one after another; None is nothing, nested iterables are flattened."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str | int):
            parts.append(escape(str(child)))
        else:
            parts.append(join(*child))
    return Markup("".join(parts))


def element(tag: str, *children: Child, **attributes: str | int | bool | None) -> Markup:
    """One HTML or SVG element.

    Attribute names take a trailing underscore off (`class_`) and turn inner ones into hyphens (`aria_label`);
    True writes the bare name, None and False leave the attribute out.
    """
    written = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        assert name != "style" and not name.startswith("on"), f"attribute {name} is not for reports"
        assert name != "href" or str(value).startswith(("#", "./", "data:,")), "links stay inside the report's folder"
        if value is None or value is False:
            continue
        written.append(name if value is True else f'{name}="{escape(str(value))}"')
    head = f"<{' '.join(written)}>"
    return Markup(head if tag in VOID else f"{head}{join(*children)}</{tag}>")


def data_block(identifier: str, data: Any) -> Markup:
    """A JSON block that a script can read and that no string inside can close.

    `<`, `>` and `&` are written as \\u escapes, and so are U+2028 and U+2029 (`json` already escapes what is
    not ASCII), so neither `</script>` nor `<!--` can appear.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{escape(identifier)}">{text}</script>')
