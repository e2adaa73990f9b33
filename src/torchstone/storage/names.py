"""Names and text that come from people: validated before they become paths, cleaned before they reach a
terminal.

Three dangers, three functions:

    validate_name   a name that becomes a folder must not leave its parent (`..`, `/`) or surprise a shell
    safe_text       text for a terminal must not move its cursor or reverse its direction
    csv_cell        a cell of a CSV file must not start a formula in a spreadsheet
"""

from __future__ import annotations

import re
import unicodedata

from torchstone.errors import ConfigError

LONGEST = 100
MOST_BYTES = 200
_ALLOWED = re.compile(r"[^\W_][\w.+@=,()\- ]*", re.UNICODE)
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def validate_name(name: str, *, what: str = "name") -> str:
    """`name` itself if it can be a folder's name on every system, else ConfigError.

    Allowed: letters, digits, and `_ . + @ = , ( ) -` and spaces inside; it starts with a letter or digit,
    does not end with a dot or space, has no `..`, is no device of Windows (`con`, `nul`) and has at most
    100 characters and 200 bytes.
    """
    fits = bool(_ALLOWED.fullmatch(name)) and ".." not in name and name[-1] not in ". "
    fits = fits and not _DEVICE.fullmatch(name)
    if not fits or len(name) > LONGEST or len(name.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise ConfigError(
            f"{what} {safe_text(name)[:40]!r} cannot be used as a file name; use 1 to {LONGEST} letters, "
            "digits and _ . + @ = , ( ) -, starting with a letter or digit, without '..' or a final dot."
        )
    return name


def safe_text(text: str) -> str:
    """`text` without escape sequences, control and direction characters; newlines and tabs stay."""
    plain = _ANSI.sub("", text)
    return "".join(c for c in plain if c in "\n\t" or unicodedata.category(c) not in _HIDDEN)


def csv_cell(value: object) -> object:
    """`value` for a CSV file: text that a spreadsheet would run as a formula gets a leading apostrophe."""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return value
