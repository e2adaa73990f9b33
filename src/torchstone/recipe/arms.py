"""Arms on the command line: `[NAME:]key=value[,key=value…]`.

Commas inside brackets, braces and quotes belong to the value. Without a name, the arm is called after what it
changes: `model.block.mixer={kind: differential, version: v2}` becomes `differential-v2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torchstone.errors import ConfigError
from torchstone.recipe.overrides import split_override
from torchstone.recipe.problems import shown

_PAIRS = {"[": "]", "{": "}", "(": ")"}
_LONGEST_NAME = 60


def parse_arm(text: str) -> tuple[str, list[str]]:
    """Name and overrides of an arm; raises ConfigError if the text is no arm.

    `NAME:` alone is an arm that changes nothing (a control for the comparison itself).
    """
    name, rest = _name_and_rest(text)
    overrides = [part.strip() for part in _split(rest)] if rest.strip() else []
    if not overrides and not name:
        raise ConfigError("an arm is empty; write [NAME:]key=value[,key=value…], see `torchstone recipe kinds`.")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"arm {shown(text)}: {shown(override)} is no key=value. Write [NAME:]key=value[,key=value…]; "
                "a value that holds a comma goes in brackets, braces or quotes."
            )
    return name or default_name(overrides), overrides


def _name_and_rest(text: str) -> tuple[str, str]:
    colon, equals = text.find(":"), text.find("=")
    if colon >= 0 and (equals < 0 or colon < equals):
        name = text[:colon].strip()
        if not name:
            raise ConfigError(f"arm {shown(text)} has an empty name; write NAME:key=value, or key=value alone.")
        return name, text[colon + 1 :]
    return "", text


def _split(text: str) -> list[str]:
    """Split at commas outside brackets, braces and quotes."""
    parts, start, closers, quote = [], 0, [], ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (not text[:place].strip() or text[:place].rstrip()[-1] in "=[{(:,"):
            quote = character
        elif character in _PAIRS:
            closers.append(_PAIRS[character])
        elif closers and character == closers[-1]:
            closers.pop()
        elif character == "," and not closers:
            parts.append(text[start:place])
            start = place + 1
    if quote or closers:
        raise ConfigError(f"arm {shown(text)}: {quote or closers[-1]!r} is missing; close every bracket and quote.")
    return [*parts, text[start:]]


def default_name(overrides: list[str]) -> str:
    """A name made of what the overrides set, of letters, digits, dots, hyphens and underscores."""
    words = [_words(str(path[-1]), value) for path, value in map(split_override, overrides)]
    name = re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+|\.{2,}", "-", "_".join(words))).strip("-._")
    return name[:_LONGEST_NAME].rstrip("-._") or "arm"


def _words(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        kind = [value["kind"]] if "kind" in value else []
        rest = [_words(name, item) for name, item in value.items() if name != "kind"]
        return "-".join(map(str, [*kind, *rest]))
    if isinstance(value, list):
        return "-".join([key, *map(str, value)])
    if isinstance(value, str):
        return value
    shown_value = "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:g}"
    return f"{key}-{shown_value}"
