"""Pattern: which mixers repeat over the depth of a model, as a list of parts or as letters.

    pattern: RRA                                          two recurrent blocks, then local attention, and again (Griffin)
    pattern: [{kind: rglru, lru_width: 512}, attention]   the same idea with settings

A letter stands for a kind with its default settings.
"""

from __future__ import annotations

from typing import Any

from torchstone.errors import ConfigError

LETTERS = {
    "A": "local-attention",
    "D": "differential",
    "G": "attention",
    "H": "hgrn2",
    "M": "moa",
    "R": "rglru",
}


def spelled_out(pattern: Any) -> Any:
    """The list of kinds that a string of letters stands for; anything else as it is.

    Raises:
        ConfigError: a letter that stands for nothing.
    """
    if not isinstance(pattern, str):
        return pattern
    if unknown := [letter for letter in pattern if letter not in LETTERS]:
        known = ", ".join(f"{letter} ({kind})" for letter, kind in LETTERS.items())
        raise ConfigError(
            f"pattern {pattern!r} has the letter {unknown[0]!r}, which stands for no mixer; letters are {known}: use those, or "
            "give a list of mixers."
        )
    return [LETTERS[letter] for letter in pattern]
