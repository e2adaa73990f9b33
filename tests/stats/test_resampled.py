"""The corrected resampled t for overlapping splits."""

from __future__ import annotations

import numpy as np
import pytest

from torchstone.errors import StudyError
from torchstone.stats.estimate import t_critical
from torchstone.stats.resampled import resampled_estimate


def test_formula() -> None:
    values = np.array([0.1, 0.3, 0.2, 0.0])
    estimate = resampled_estimate(values, 0.2)
    half = t_critical(4) * values.std(ddof=1) * (1 / 4 + 0.25) ** 0.5
    assert (estimate.low, estimate.high) == pytest.approx((0.15 - half, 0.15 + half))


def test_more_splits_of_the_same_items_do_not_shrink_it_to_nothing() -> None:
    draws = np.random.default_rng(0).normal(size=10_000)
    estimate = resampled_estimate(draws, 0.5)
    assert estimate.high - estimate.low > 3.5


def test_one_split_has_no_interval() -> None:
    assert resampled_estimate([0.3], 0.5).low is None


def test_refusals() -> None:
    with pytest.raises(StudyError, match="share"):
        resampled_estimate([0.1, 0.2], 1.0)
    with pytest.raises(StudyError, match="not finite"):
        resampled_estimate([0.1, float("nan")], 0.5)


def test_covers_when_splits_share_their_items() -> None:
    """Means over random halves of 60 items: the naive t interval covers far too seldom, the corrected one does not."""
    rng, naive, corrected = np.random.default_rng(1), 0, 0
    for _ in range(400):
        items = rng.normal(size=60)
        splits = [items[rng.permutation(60)[:30]].mean() for _ in range(20)]
        corrected_estimate = resampled_estimate(splits, 0.5)
        corrected += corrected_estimate.low <= 0 <= corrected_estimate.high
        half = t_critical(20) * np.std(splits, ddof=1) / 20**0.5
        naive += abs(np.mean(splits)) <= half
    assert naive / 400 < 0.5
    assert corrected / 400 >= 0.93
