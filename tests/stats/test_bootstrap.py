"""Clustered bootstrap: the estimate, independence of seeds of the generator, edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from torchstone.errors import StudyError
from torchstone.stats.bootstrap import MINIMUM_CLUSTERS, clustered_estimate
from torchstone.stats.decision import decide


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_effect_is_the_mean_over_items_and_n_counts_clusters() -> None:
    values = np.arange(30.0)
    estimate = clustered_estimate(values, np.repeat(np.arange(15), 2), rng())
    assert estimate.effect == pytest.approx(14.5)
    assert estimate.n == 15
    assert estimate.low < 14.5 < estimate.high


def test_the_same_generator_gives_the_same_interval() -> None:
    values = rng(1).normal(size=40)
    one, other = (clustered_estimate(values, None, rng(5)) for _ in range(2))
    assert one == other
    assert one != clustered_estimate(values, None, rng(6))


def test_copies_of_an_item_add_no_evidence() -> None:
    values = rng(2).normal(0.3, 1.0, 40)
    single = clustered_estimate(values, None, rng(3))
    copied = clustered_estimate(np.repeat(values, 5), np.repeat(np.arange(40), 5), rng(3))
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high), rel=1e-9)
    ignored = clustered_estimate(np.repeat(values, 5), None, rng(3))
    assert ignored.high - ignored.low < 0.6 * (single.high - single.low)


def test_interval_approaches_the_t_interval_for_many_normal_items() -> None:
    values = rng(4).normal(size=2000)
    estimate = clustered_estimate(values, None, rng(5))
    half = 1.96 * values.std(ddof=1) / 2000**0.5
    assert estimate.high - estimate.effect == pytest.approx(half, rel=0.08)
    assert estimate.effect - estimate.low == pytest.approx(half, rel=0.08)


def test_skewed_items_get_a_lopsided_interval() -> None:
    values = rng(6).exponential(size=40)
    estimate = clustered_estimate(values, None, rng(7))
    assert estimate.high - estimate.effect > 1.1 * (estimate.effect - estimate.low)


def test_few_clusters_have_no_interval() -> None:
    values = np.repeat(rng(8).normal(5, 1, MINIMUM_CLUSTERS - 1), 100)
    estimate = clustered_estimate(values, np.repeat(np.arange(MINIMUM_CLUSTERS - 1), 100), rng())
    assert estimate.low is None
    assert decide(estimate).status == "inconclusive"


def test_identical_arms_do_not_hold() -> None:
    assert decide(clustered_estimate(np.zeros(50), None, rng())).status == "inconclusive"


def test_values_of_few_kinds_keep_a_finite_interval() -> None:
    values = np.zeros(30)
    values[0] = 1.0
    estimate = clustered_estimate(values, None, rng())
    assert estimate.low < 0 < estimate.high


def test_chunks_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng(9).normal(size=50)
    whole = clustered_estimate(values, None, rng(1))
    monkeypatch.setattr("torchstone.stats.bootstrap._CHUNK", 1000)
    assert clustered_estimate(values, None, rng(1)).low == pytest.approx(whole.low, rel=1e-9)


def test_refusals() -> None:
    with pytest.raises(StudyError, match="not finite"):
        clustered_estimate([1.0, float("inf")], None, rng())
    with pytest.raises(StudyError, match="cluster labels"):
        clustered_estimate([1.0, 2.0], [1], rng())
    with pytest.raises(StudyError, match="resamples"):
        clustered_estimate([1.0, 2.0], None, rng(), resamples=10)
