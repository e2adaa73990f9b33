"""The group-sequential rule: boundaries, looks, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as reference

from torchstone.errors import StudyError
from torchstone.stats.estimate import t_critical
from torchstone.stats.sequential import SequentialDesign, declared_looks, simulate_statistics, spent


def test_a_single_look_is_the_usual_t_test() -> None:
    assert SequentialDesign((5,)).boundaries == pytest.approx((t_critical(5),))


def test_first_boundary_is_exact_and_the_rest_fall() -> None:
    design = SequentialDesign((3, 5, 8, 10))
    assert design.boundaries[0] == pytest.approx(reference.t.ppf(1 - 0.05 * 0.3 / 2, 2), rel=1e-9)
    assert list(design.boundaries) == sorted(design.boundaries, reverse=True)
    assert all(bound > t_critical(n) for bound, n in zip(design.boundaries, design.looks, strict=True))


def test_boundaries_repeat() -> None:
    from torchstone.stats import sequential

    first = SequentialDesign((4, 7)).boundaries
    sequential._boundaries.cache_clear()
    assert SequentialDesign((4, 7)).boundaries == first


def test_obrien_fleming_spends_later_than_linear() -> None:
    linear, late = SequentialDesign((3, 6, 9)), SequentialDesign((3, 6, 9), spending="obrien-fleming")
    assert late.boundaries[0] > linear.boundaries[0]
    assert late.boundaries[-1] < linear.boundaries[-1]


@pytest.mark.parametrize("spending", ["linear", "obrien-fleming"])
def test_spending_ends_at_the_whole_error(spending: str) -> None:
    assert spent(1.0, 0.05, spending) == pytest.approx(0.05)  # type: ignore[arg-type]
    assert spent(0.3, 0.05, spending) < 0.05  # type: ignore[arg-type]


def test_simulated_statistics_are_t_statistics() -> None:
    statistics = simulate_statistics((3, 4, 8), 40_000, np.random.default_rng(0))
    for row, n in zip(statistics, (3, 4, 8), strict=True):
        assert reference.kstest(row, "t", args=(n - 1,)).pvalue > 1e-3


def test_simulated_looks_share_their_seeds_as_real_ones_do() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((40_000, 8))
    real = np.array([values[:, :n].mean(1) / (values[:, :n].std(1, ddof=1) / n**0.5) for n in (5, 8)])
    made = simulate_statistics((5, 8), 40_000, np.random.default_rng(2))
    joint = [(np.abs(s) > 2).all(axis=0).mean() for s in (real, made)]
    assert joint[0] == pytest.approx(joint[1], abs=0.006)


def test_declared_looks() -> None:
    assert declared_looks(3, 10) == (3, 5, 8, 10)
    assert declared_looks(2, 3) == (2, 3)
    assert declared_looks(5, 5) == (5,)
    with pytest.raises(StudyError, match="2 <= first"):
        declared_looks(1, 5)
    with pytest.raises(StudyError, match="2 <= first"):
        declared_looks(6, 5)


def test_estimates_only_at_declared_looks() -> None:
    design = SequentialDesign((3, 5))
    assert design.estimate([1.0, 1.1, 0.9]).low > 0
    with pytest.raises(StudyError, match="not a declared look"):
        design.estimate([1.0, 1.1, 0.9, 1.0])


def test_equal_contrasts_decide_only_within_the_spent_error() -> None:
    design = SequentialDesign((3, 6, 8))
    assert design.estimate([0.01] * 6).low is None
    assert design.estimate([0.01] * 8).low == pytest.approx(0.01)


def test_a_look_that_may_spend_nothing_decides_nothing() -> None:
    design = SequentialDesign((2, 2000), spending="obrien-fleming")
    estimate = design.estimate([1.0, 1.0001])
    assert estimate.low is None or estimate.low < 0


def test_minimum_detectable_effect_lies_above_that_of_a_fixed_design() -> None:
    from torchstone.stats.power import minimum_detectable_effect

    fixed = minimum_detectable_effect(1.0, 10)
    assert fixed < SequentialDesign((3, 5, 8, 10)).minimum_detectable_effect(1.0) < 1.3 * fixed


def test_refusals() -> None:
    for looks in ((), (1, 3), (3, 3), (5, 4)):
        with pytest.raises(StudyError, match="looks"):
            SequentialDesign(looks)
    with pytest.raises(StudyError, match="spending"):
        SequentialDesign((3, 5), spending="pocock")  # type: ignore[arg-type]
