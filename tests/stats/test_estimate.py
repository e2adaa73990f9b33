"""t intervals, equal contrasts, the decision rule, power."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from torchstone.errors import StudyError
from torchstone.stats.decision import decide, expected_false_holds
from torchstone.stats.estimate import Estimate, t_estimate, units_for_identical
from torchstone.stats.power import minimum_detectable_effect, power, units_needed

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(VALUES, st.floats(-5, 5))
def test_t_interval_and_p_values_are_scipys(values: list[float], margin: float) -> None:
    estimate = t_estimate(values, margin=margin)
    if estimate.method != "t" or np.ptp(values) < 1e-9 * max(1.0, np.abs(values).max()):
        assert np.ptp(values) <= 1e-6
        return
    low, high = reference.t.interval(0.95, len(values) - 1, np.mean(values), reference.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    two_sided = reference.ttest_1samp(values, margin).pvalue
    greater = reference.ttest_1samp(values, margin, alternative="greater").pvalue
    assert estimate.p_two_sided == pytest.approx(two_sided, rel=1e-6, abs=1e-12)
    assert estimate.p_greater == pytest.approx(greater, rel=1e-6, abs=1e-12)
    assert estimate.p_less == pytest.approx(1 - greater, rel=1e-6, abs=1e-9)


@given(VALUES, st.floats(-5, 5))
def test_interval_and_p_value_agree_on_the_verdict(values: list[float], margin: float) -> None:
    estimate = t_estimate(values, margin=margin)
    if estimate.p_greater is None or min(abs(estimate.p_greater - 0.025), abs(estimate.p_less - 0.025)) < 1e-9:
        return
    status = decide(estimate, margin=margin, direction="greater").status
    assert (status == "holds") == (estimate.p_greater < 0.025)
    assert (status == "fails") == (estimate.p_less < 0.025)


@given(VALUES, st.floats(-5, 5))
def test_the_claim_turned_round_gets_the_verdict_turned_round(values: list[float], margin: float) -> None:
    one = decide(t_estimate(values), margin=margin, direction="greater").status
    other = decide(t_estimate([-v for v in values]), margin=-margin, direction="less").status
    assert one == other


def test_one_value_has_no_interval() -> None:
    estimate = t_estimate([0.4])
    assert (estimate.low, estimate.high, estimate.n) == (None, None, 1)
    assert decide(estimate).status == "inconclusive"


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_equal_contrasts_do_not_decide(n: int) -> None:
    """Three times +0.01 on a coarse grid is no certainty."""
    estimate = t_estimate([0.01] * n)
    assert estimate.low is None and "equal" in estimate.note
    assert decide(estimate).status == "inconclusive"


@pytest.mark.parametrize("n", [6, 10])
def test_many_equal_contrasts_decide_by_order_statistics(n: int) -> None:
    assert decide(t_estimate([0.01] * n)).status == "holds"
    assert decide(t_estimate([-0.01] * n)).status == "fails"


@pytest.mark.parametrize("n", [3, 6, 20])
def test_arms_that_agree_exactly_do_not_hold(n: int) -> None:
    assert decide(t_estimate([0.0] * n)).status == "inconclusive"


def test_a_spread_of_rounding_errors_is_no_spread() -> None:
    values = [0.3, 0.1 + 0.2, 0.3]
    assert t_estimate(values).method == "identical"
    assert t_estimate([1e-9, 2e-9, 1.5e-9], resolution=1e-8).method == "identical"


def test_equal_contrasts_need_more_units_at_a_stricter_level() -> None:
    assert units_for_identical(0.05) == 6
    assert units_for_identical(0.01) == 8
    assert t_estimate([1.0] * 6, critical=8.0).low is None


def test_declared_deterministic_numbers() -> None:
    assert decide(t_estimate([2.0], deterministic=True), margin=1.0).status == "holds"
    assert decide(t_estimate([0.0, 0.0], deterministic=True)).status == "inconclusive"
    with pytest.raises(StudyError, match="declared deterministic"):
        t_estimate([1.0, 2.0], deterministic=True)


def test_refusals() -> None:
    with pytest.raises(StudyError, match="not finite"):
        t_estimate([1.0, float("nan")])
    with pytest.raises(StudyError, match="at least one"):
        t_estimate([])
    with pytest.raises(StudyError, match="level"):
        t_estimate([1.0, 2.0], level=95)
    with pytest.raises(StudyError, match="direction"):
        decide(t_estimate([1.0, 2.0]), direction="up")  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="margin"):
        decide(t_estimate([1.0, 2.0]), margin=float("inf"))


def test_decision_rule() -> None:
    def status(low: float, high: float, margin: float, direction: str) -> str:
        return decide(Estimate(0.0, low, high, 0.95, 5), margin=margin, direction=direction).status  # type: ignore[arg-type]

    assert status(0.1, 0.3, 0.0, "greater") == "holds"
    assert status(0.1, 0.3, 0.0, "less") == "fails"
    assert status(0.1, 0.3, 0.2, "greater") == "inconclusive"
    assert status(0.1, 0.3, 0.5, "greater") == "fails"
    assert status(-0.3, -0.1, -0.05, "less") == "holds"
    assert status(0.0, 0.3, 0.0, "greater") == "inconclusive"


def test_expected_false_holds() -> None:
    assert expected_false_holds(8) == pytest.approx(0.2)


def test_power_is_the_simulated_one() -> None:
    rng = np.random.default_rng(0)
    for n, distance in ((3, 2.0), (5, 1.0), (10, 0.8)):
        draws = rng.normal(distance, 1.0, (20_000, n))
        t = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / n**0.5)
        simulated = (t > reference.t.ppf(0.975, n - 1)).mean()
        assert power(distance, 1.0, n) == pytest.approx(simulated, abs=0.012)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 200])
def test_minimum_detectable_effect_has_the_power_it_says(n: int) -> None:
    effect = minimum_detectable_effect(0.3, n)
    assert effect is not None
    assert power(effect, 0.3, n) == pytest.approx(0.8, abs=1e-6)


def test_minimum_detectable_effect_without_spread_or_units() -> None:
    assert minimum_detectable_effect(0.3, 1) is None
    assert minimum_detectable_effect(0.0, 5) == 0.0


@pytest.mark.parametrize(("distance", "sd"), [(0.5, 1.0), (3.0, 1.0), (0.05, 1.0)])
def test_units_needed_is_the_smallest_number(distance: float, sd: float) -> None:
    n = units_needed(distance, sd)
    assert n is not None and power(distance, sd, n) >= 0.8
    assert n == 2 or power(distance, sd, n - 1) < 0.8


def test_units_needed_of_no_effect() -> None:
    assert units_needed(0.0, 1.0) is None
    assert units_needed(1e-4, 1.0, limit=1000) is None
    with pytest.raises(StudyError, match="standard deviation"):
        power(1.0, float("nan"), 3)
