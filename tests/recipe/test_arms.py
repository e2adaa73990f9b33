"""Arms on the command line."""

from __future__ import annotations

import pytest

from torchstone.errors import ConfigError
from torchstone.recipe.arms import parse_arm
from torchstone.storage.names import validate_name


@pytest.mark.parametrize(
    ("text", "name", "overrides"),
    [
        ("model.block.mixer=differential", "differential", ["model.block.mixer=differential"]),
        ("v2:a={kind: beta, version: v2},seed=3", "v2", ["a={kind: beta, version: v2}", "seed=3"]),
        ("a={kind: differential, version: v2}", "differential-v2", ["a={kind: differential, version: v2}"]),
        ("a=[1, 2], b='x, y' ,c=\"p,q\"", "a-1-2_x-y_p-q", ["a=[1, 2]", "b='x, y'", 'c="p,q"']),
        ("a={x: [1, {y: 2}], z: 3},b=1", "x-1-y-2-z-3_b-1", ["a={x: [1, {y: 2}], z: 3}", "b=1"]),
        ("path=s3://bucket/x,seed=1", "s3-bucket-x_seed-1", ["path=s3://bucket/x", "seed=1"]),
        ("optimizer.learning_rate=3e-4,compile=false", "learning_rate-0.0003_compile-false",
         ["optimizer.learning_rate=3e-4", "compile=false"]),
        ("a=don't", "don-t", ["a=don't"]),
        ("same:", "same", []),
        (" named : a=1", "named", ["a=1"]),
        ("q:a='{'", "q", ["a='{'"]),
    ],
)  # fmt: skip
def test_names_and_overrides(text: str, name: str, overrides: list[str]) -> None:
    parsed_name, parsed = parse_arm(text)
    assert parsed == overrides
    assert parsed_name == name


def test_default_names_can_be_folders() -> None:
    for text in ("a='*?/..'", "a={b: {c: [d, 'é ü']}}", "x.y=-3", "a=''", "a=[]", "path=/etc/passwd"):
        assert validate_name(parse_arm(text)[0])


@pytest.mark.parametrize("text", ["", "x", ":a=1", "a=1,b", "a={", "a=[1", "a='x", "a=1,,b=2"])
def test_what_is_no_arm(text: str) -> None:
    with pytest.raises(ConfigError, match="arm"):
        parse_arm(text)


def test_long_default_names_are_cut() -> None:
    name, _ = parse_arm(",".join(f"some.key_{index}={index}" for index in range(40)))
    assert len(name) <= 60
