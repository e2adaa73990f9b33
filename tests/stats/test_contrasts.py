"""Paired contrasts: values, pairing, rounding noise, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from torchstone.errors import StudyError
from torchstone.stats.contrasts import cluster_codes, paired, paired_items, paired_seeds


def test_difference_and_log_ratio() -> None:
    assert paired([3.0, 5.0], [1.0, 1.0]).values.tolist() == [2.0, 4.0]
    assert paired([2.0, 1.0], [1.0, 2.0], "log ratio").values == pytest.approx([np.log(2), -np.log(2)])


def test_rounding_noise_is_no_contrast() -> None:
    contrasts = paired([0.1 + 0.2, 3.2], [0.3, 3.2 + 4e-16])
    assert contrasts.values.tolist() == [0.0, 0.0]
    assert paired([1e6 + 1e-3], [1e6]).values[0] == pytest.approx(1e-3, rel=1e-6)


def test_log_ratio_rounding_noise() -> None:
    assert paired([1e-300 * (1 + 2e-16)], [1e-300], "log ratio").values.tolist() == [0.0]


def test_seeds_are_matched_by_key() -> None:
    contrasts = paired_seeds({0: 1.0, 1: 2.0}, {1: 5.0, 0: 3.0})
    assert contrasts.values.tolist() == [-2.0, -3.0]
    assert contrasts.units == ("0", "1")


def test_items_of_several_seeds_are_clustered_by_item() -> None:
    arm = {0: {"a": 1.0, "b": 0.0}, 1: {"b": 1.0, "c": 1.0}}
    baseline = {0: {"a": 0.0, "b": 0.0}, 1: {"b": 0.0, "c": 0.0}}
    contrasts = paired_items(arm, baseline)
    assert contrasts.values.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert contrasts.clusters.tolist() == [0, 1, 1, 2]
    assert contrasts.n == 3


def test_items_can_be_clustered_by_document() -> None:
    values = {0: {"d1/x": 1.0, "d1/y": 2.0, "d2/x": 3.0}}
    assert paired_items(values, values, cluster_of=lambda item: item.split("/")[0]).n == 2


def test_missing_seeds_and_items_are_named() -> None:
    with pytest.raises(StudyError, match=r"seeds.*only in the arm: \['2'\]"):
        paired_seeds({0: 1.0, 2: 1.0}, {0: 1.0})
    with pytest.raises(StudyError, match="items of seed 0"):
        paired_items({0: {"a": 1.0}}, {0: {"b": 1.0}})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(StudyError, match="not finite"):
        paired([1.0, bad], [1.0, 1.0])


def test_log_ratio_needs_positive_numbers() -> None:
    with pytest.raises(StudyError, match="above 0"):
        paired([1.0, 0.0], [1.0, 1.0], "log ratio")


def test_unusable_shapes_are_refused() -> None:
    with pytest.raises(StudyError, match="one length"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(StudyError, match="at least one"):
        paired([], [])
    with pytest.raises(StudyError, match="cluster labels"):
        paired([1.0, 2.0], [1.0, 2.0], clusters=["a"])
    with pytest.raises(StudyError, match="unknown contrast"):
        paired([1.0], [1.0], "ratio")  # type: ignore[arg-type]


def test_cluster_codes_follow_first_appearance() -> None:
    assert cluster_codes(["b", "a", "b"]).tolist() == [0, 1, 0]
