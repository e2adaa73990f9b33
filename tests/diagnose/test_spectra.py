"""Metrics of singular values: bounds, invariances and known values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from torchstone.diagnose.spectra import NORMS, RANKS, pseudo_rank, spectral_metrics
from torchstone.errors import ConfigError

values = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)
shares = st.floats(0.01, 1.0)


def spectrum(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@given(values, shares)
def test_ranks_lie_between_one_and_the_number_of_values(numbers, f):
    found = spectral_metrics(spectrum(numbers), f)
    assert list(found) == [*NORMS, *RANKS]
    for name in RANKS:
        assert 1 - 1e-9 <= float(found[name]) <= len(numbers) + 1e-9, name


@given(values, st.floats(1e-3, 1e3))
def test_ranks_do_not_depend_on_scale_and_norms_are_proportional_to_it(numbers, factor):
    one, scaled = spectral_metrics(spectrum(numbers)), spectral_metrics(factor * spectrum(numbers))
    for name in ("stable_rank", "effective_rank", "participation"):
        assert float(scaled[name]) == pytest.approx(float(one[name]), rel=1e-9)
    for name in NORMS:
        assert float(scaled[name]) == pytest.approx(factor * float(one[name]), rel=1e-9)


@given(values, st.integers(0, 100))
def test_ranks_do_not_depend_on_scale_by_powers_of_two_at_all(numbers, exponent):
    factor = 2.0 ** (exponent - 50)
    one, scaled = spectral_metrics(spectrum(numbers)), spectral_metrics(factor * spectrum(numbers))
    for name in RANKS:
        assert torch.equal(one[name], scaled[name])


@given(values, st.randoms(use_true_random=False))
def test_the_order_of_the_values_does_not_matter(numbers, random):
    shuffled = list(numbers)
    random.shuffle(shuffled)
    one, other = spectral_metrics(spectrum(numbers)), spectral_metrics(spectrum(shuffled))
    for name, value in one.items():
        assert float(other[name]) == pytest.approx(float(value), rel=1e-12), name


@given(values, shares, shares)
def test_pseudo_rank_grows_with_its_share(numbers, first, second):
    low, high = sorted((first, second))
    assert float(pseudo_rank(spectrum(numbers), low)) <= float(pseudo_rank(spectrum(numbers), high))


@given(values)
def test_flattening_a_spectrum_raises_its_ranks(numbers):
    assume(max(numbers) > 1.01 * min(numbers))
    steep, flat = spectral_metrics(spectrum(numbers)), spectral_metrics(spectrum(numbers).sqrt())
    for name in RANKS:
        assert float(flat[name]) >= float(steep[name]) - 1e-9, name


@given(values, st.integers(1, 5))
def test_zeros_change_nothing_but_the_threshold_of_the_numeric_rank(numbers, zeros):
    assume(min(numbers) > 1e-4 * max(numbers))
    one, padded = spectral_metrics(spectrum(numbers)), spectral_metrics(spectrum(numbers + [0.0] * zeros))
    for name, value in one.items():
        assert float(padded[name]) == pytest.approx(float(value), rel=1e-12), name


def test_known_values():
    found = spectral_metrics(torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]]), f=0.75)
    assert found["pseudo_rank"].tolist() == [2, 0, 3]
    assert found["energy_rank"].tolist() == [2, 0, 3]
    assert found["stable_rank"].tolist() == [1.5, 0, 4]
    assert found["numeric_rank"].tolist() == [3, 0, 4]
    assert found["participation"].tolist() == pytest.approx([36 / 18, 0, 4])
    assert found["effective_rank"].tolist() == pytest.approx([2 ** (0.5 * 1 + 2 * 0.25 * 2), 0, 4])
    assert found["nuclear"].tolist() == [4, 0, 12]


def test_tiny_and_huge_values_neither_vanish_nor_overflow():
    shape = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    plain = spectral_metrics(shape)
    for factor in (1e-200, 1e200):
        found = spectral_metrics(factor * shape)
        for name in RANKS:
            assert float(found[name]) == pytest.approx(float(plain[name]), rel=1e-12)
        assert float(found["frobenius"]) == pytest.approx(factor * float(plain["frobenius"]), rel=1e-12)


@pytest.mark.parametrize("f", [0, -0.1, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(f):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        pseudo_rank(torch.ones(3), f)
