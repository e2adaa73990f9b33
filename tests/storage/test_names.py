"""P22: names become folders only if they stay in their parent; text and cells are harmless when shown."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.storage.names import csv_cell, safe_text, validate_name

GOOD = ["softmax", "diff v2", "lr=3e-3,depth=2", "a", "Ünïcode", "x" * 100, "7B+rope@1k", "arm(1)", "0.5"]
BAD = {
    "empty": "",
    "parent": "..",
    "hidden": ".hidden",
    "separator": "a/b",
    "backslash": "a\\b",
    "parent inside": "a..b",
    "option": "-rf",
    "underscore": "_private",
    "final dot": "a.",
    "final space": "a ",
    "leading space": " a",
    "newline": "a\nb",
    "final newline": "a\n",
    "NUL": "a\x00b",
    "escape": "a\x1b[31m",
    "right-to-left": "a\u202eb",
    "zero width": "a\u200bb",
    "too long": "x" * 101,
    "too many bytes": "漢" * 80,
    "device": "con",
    "device with suffix": "NUL.txt",
    "glob": "a*",
    "quote": "a'b",
    "dollar": "a$HOME",
    "tilde": "~",
    "surrogate": "a\ud800",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_names_pass_unchanged(name):
    assert validate_name(name) == name


@pytest.mark.parametrize("name", BAD.values(), ids=BAD)
def test_bad_names_are_refused_in_one_clean_line(name):
    with pytest.raises(ConfigError) as caught:
        validate_name(name, what="arm")
    text = str(caught.value)
    assert text.startswith("arm ")
    assert not any(unicodedata.category(c) in ("Cc", "Cf") for c in text)
    assert len(text) < 300


@given(st.text(max_size=120))
def test_a_name_that_passes_is_one_folder_below_its_parent(tmp_path_factory, name):
    try:
        validate_name(name)
    except ConfigError:
        return
    parent = tmp_path_factory.getbasetemp() / "names"
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    assert folder.resolve().parent == parent.resolve()


@given(st.text(max_size=60))
def test_terminal_text_has_no_control_and_no_direction(text):
    found = safe_text(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in found if c not in "\n\t")
    assert safe_text(found) == found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07rest", "rest"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("abc\rxyz", "abcxyz"),
        ("a\u202egnp.exe", "agnp.exe"),
        ("\x9b31m", "31m"),
        ("two\nlines\tkept", "two\nlines\tkept"),
        ("λ ≤ 0.5 → 漢字", "λ ≤ 0.5 → 漢字"),
    ],
)
def test_terminal_examples(text, shown):
    assert safe_text(text) == shown


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@sum(a1)", "\t=1", "\r=1", "\n=1", '=cmd|"/c calc"!a'])
def test_cells_do_not_start_formulas(cell):
    assert csv_cell(cell) == "'" + cell


@pytest.mark.parametrize("cell", ["text", "a=b", "", 1, -1, -0.5, None, True])
def test_other_cells_are_unchanged(cell):
    assert csv_cell(cell) is cell
