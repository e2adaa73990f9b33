"""Keyed random numbers: fixed for all time, independent of their neighbours, evenly spread."""

from __future__ import annotations

import numpy as np
import pytest

from torchstone.data.keyed import integers, key, mix, uniform, words


def test_the_numbers_are_splitmix64() -> None:
    """First outputs of SplitMix64 from seed 1234567, as its public test vectors have them."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert words(np.array([1234567], dtype=np.uint64), 3)[0].tolist() == expected


def test_keys_of_different_paths_differ() -> None:
    paths: list[tuple[str | int, ...]] = [
        ("a", 1),
        (1, "a"),
        ("a", 1, 0),
        ("a", 0, 1),
        ("a",),
        ("aa",),
        ("a", "a"),
        ("a\0",),
        (0,),
        (0, 0),
    ]
    assert len({int(key(*path)[0]) for path in paths}) == len(paths)


def test_rows_do_not_depend_on_each_other() -> None:
    together = uniform(key("x", 3, np.arange(10)), 5)
    assert np.array_equal(together[7:8], uniform(key("x", 3, 7), 5))
    assert np.array_equal(together[:, :2], uniform(key("x", 3, np.arange(10)), 2))


def test_mix_is_a_bijection_on_a_sample() -> None:
    assert len(set(mix(np.arange(100_000)).tolist())) == 100_000


@pytest.mark.parametrize("high", [2, 3, 8, 1000])
def test_integers_are_even(high: int) -> None:
    drawn = integers(key("even", np.arange(2000)), 50, high)
    counts = np.bincount(drawn.ravel(), minlength=high)
    expected = drawn.size / high
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert len(counts) == high and abs(chi2 - (high - 1)) < 5 * np.sqrt(2 * high)


def test_neighbouring_rows_are_uncorrelated() -> None:
    drawn = uniform(key("rows", np.arange(3000)), 20)
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02
