"""Numbers as text: precision, signs, units, missing values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (3, "3"),
        (12345, "12,345"),
        (2.31456, "2.315"),
        (0.000012, "1.200e-05"),
        (-4.5, "-4.500"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert numbers.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (999, "999"), (1_213_440, "1.21 M"), (999_900, "1 M"), (3.1e12, "3.1 T"), (2e9, "2 B")],
)
def test_quantity(value: float | None, text: str) -> None:
    assert numbers.quantity(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.42, "0.42 s"), (250, "4 min 10 s"), (7500, "2 h 05 min"), (None, "–")])
def test_seconds(value: float | None, text: str) -> None:
    assert numbers.seconds(value) == text


def test_size() -> None:
    assert numbers.size(1.5 * 2**30) == "1.5 GiB"
    assert numbers.size(12) == "12 B"


def test_precision_follows_the_spread() -> None:
    assert numbers.signed(-0.0412345, numbers.places_for(0.0123)) == "-0.041"
    assert numbers.signed(41.2345, numbers.places_for(12.0)) == "+41"
    assert numbers.signed(0.00001, 3) == "0"


def test_typeset_changes_minus_signs_only() -> None:
    assert numbers.typeset("-0.04 to -0.02, arm-3, 1e-05, 3-4") == "−0.04 to −0.02, arm-3, 1e-05, 3-4"


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_lie_inside_and_are_few(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(1.0, abs(low)):
        return
    ticks = numbers.ticks(low, high, most=6)
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert len(ticks) <= 7
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_has_a_text(value: float) -> None:
    for show in (numbers.number, numbers.quantity, numbers.reading, numbers.seconds, numbers.size):
        assert show(abs(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.314, "2.31"), (0.9, "0.9"), (29_358.3, "29,400"), (0.000171, "0.000171"), (12.0, "12"), (1e-9, "1.00e-09")],
)
def test_factors_keep_three_significant_digits(value, text):
    assert numbers.significant(value) == text


def test_ticks_of_factors_are_round_and_inside():
    wide = [math.exp(value) for value in numbers.factor_ticks(math.log(2e-4), math.log(3e4), most=6)]
    assert wide == pytest.approx([1e-3, 1e-1, 1e1, 1e3], rel=1e-9) or len(wide) >= 3
    assert all(2e-4 <= value <= 3e4 for value in wide)
    narrow = [math.exp(value) for value in numbers.factor_ticks(math.log(0.8), math.log(3.0), most=6)]
    assert narrow == pytest.approx([1, 2])
