"""The strict YAML reader and the writer that it understands."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.recipe.yaml import MAX_BYTES, dump_yaml, parse_yaml, read_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**80), 10**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30)
    | st.sampled_from(
        [
            "3e-4",
            "1e6",
            "on",
            "no",
            "null",
            "~",
            "",
            "0x1F",
            "0o7",
            "010",
            "1_000",
            "<<",
            "=",
            "1:30",
            "2020-01-01",
            ".5",
            "5.",
            "+1",
            "-.inf",
            ".nan",
            "True",
            " a ",
            "- b",
            "#c",
            "a: b",
            "*x",
            "&y",
            "!t",
            "\n",
            "a\nb",
            "\u2028",
            "\ufeff",
            "\x85",
            "é",
            "😀",
            "'",
            '"',
            "{",
            "[",
            "%",
            "@",
            "`",
            "|",
        ]
    )
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)


@given(DATA)
def test_writing_and_reading_gives_the_same_data(data: Any) -> None:
    again = parse_yaml(dump_yaml(data)).data
    assert again == data
    assert repr(again) == repr(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("7", 7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("FALSE", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("null", None),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        ("'3e-4'", "3e-4"),
        ('"true"', "true"),
        ("v1", "v1"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}\n").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_aliases_stand_for_their_anchor() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: [*x, *x]").data == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": [{"b": 1}] * 2,
    }


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("a: 1\nb: 2\na: 3", "3:1", "twice"),
        ("a:\n  b: .nan", "2:6", "finite"),
        ("a: -.inf", "1:4", "finite"),
        ("a: 1e999", "1:4", "too large"),
        ("a: " + "9" * 200, "1:4", "100 characters"),
        ("a: !!python/object:os.system x", "1:4", "tag"),
        ("a: !thing x", "1:4", "tag"),
        ("1: a", "1:1", "key"),
        ("true: a", "1:1", "key"),
        ("? [a]\n: b", "1:3", "key"),
        ("a: 1\n---\nb: 2", "2:1", "second document"),
        ("a: *nothing", "1:4", "anchor"),
        ("&a [*a]", "1:5", "inside"),
        ("a: [1, 2\nb: 3", "2:2", "not valid YAML"),
        ("a:\n\t- 1", "2:1", "not valid YAML"),
        ("a: \x07", "1:4", "U+0007"),
        ("ab: \x00", "1:5", "U+0000"),
        (b"ok: 1\nbad: \xff", "2:6", "UTF-8"),
    ],
)
def test_what_is_refused_is_named_with_its_place(text: str | bytes, place: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "file.yaml")
    assert str(caught.value).startswith(f"file.yaml:{place}: ")
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_text_is_read_or_refused_with_a_typed_error(text: str | bytes) -> None:
    try:
        parse_yaml(text)
    except ConfigError as error:
        assert str(error).startswith("<text>:")


def test_places_of_keys_and_items() -> None:
    document = parse_yaml("a: 1\nb:\n  c: [x, y]\n", "f.yaml")
    assert document.where(("b", "c")) == "f.yaml:3:3"
    assert document.where(("b", "c", 1)) == "f.yaml:3:10"
    assert document.where(("b", "unknown", "deeper")) == "f.yaml:2:1"


def test_a_file_with_a_byte_order_mark_and_windows_line_ends(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [2,\r\n 3]\r\n")
    assert read_yaml(path).data == {"a": 1, "b": [2, 3]}


def test_missing_and_oversized_files(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "absent.yaml")
    big = tmp_path / "big.yaml"
    big.write_bytes(b"a" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="256 KiB"):
        read_yaml(big)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_not_written(number: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        dump_yaml({"a": [number]})


def test_only_plain_data_is_written() -> None:
    with pytest.raises(ConfigError, match="plain data"):
        dump_yaml({"a": object()})
