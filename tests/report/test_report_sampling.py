"""Seeds on one grid and down-sampling."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from torchstone.report.result import Series
from torchstone.report.sampling import common_axes, largest_triangles, mean_and_range, on_one_grid


def line(points: list[float], values: list[float | None], rate: float = 1.0) -> Series:
    return Series(
        axes={"tokens": tuple(points), "seconds": tuple(rate * point for point in points)},
        values=tuple(values),
    )


def test_equal_grids_are_kept_exactly() -> None:
    aligned = on_one_grid([line([1, 2, 4], [3.0, 2.0, 1.0], 1.0), line([1, 2, 4], [5.0, 4.0, 3.0], 3.0)])
    mean, low, high = mean_and_range(aligned.values_sp)
    assert aligned.axes["tokens"].tolist() == [1, 2, 4]
    assert aligned.axes["seconds"].tolist() == [2, 4, 8]
    assert mean.tolist() == [4, 3, 2] and low.tolist() == [3, 2, 1] and high.tolist() == [5, 4, 3]


def test_a_seed_that_stopped_early_has_no_values_after_its_end() -> None:
    aligned = on_one_grid([line([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0]), line([1, 3], [4.0, 4.0])])
    assert np.isnan(aligned.values_sp[1]).tolist() == [False, False, False, True]
    assert aligned.values_sp[1, 1] == 4.0
    mean, low, high = mean_and_range(aligned.values_sp)
    assert mean[3] == low[3] == high[3] == 1.0


def test_missing_values_stay_missing() -> None:
    aligned = on_one_grid([line([1, 2, 3], [None, 2.0, 1.0])])
    mean, low, high = mean_and_range(aligned.values_sp)
    assert np.isnan([mean[0], low[0], high[0]]).all() and mean[2] == 1.0


def test_unsorted_and_repeated_points_are_put_in_order() -> None:
    aligned = on_one_grid([line([3, 1, 1, 2], [1.0, 3.0, 9.0, 2.0])])
    assert aligned.axes["tokens"].tolist() == [1, 2, 3]
    assert aligned.values_sp[0].tolist() == [3.0, 2.0, 1.0]


def test_only_shared_axes_remain_and_known_ones_come_first() -> None:
    both = [
        Series(axes={"epochs": (1.0,), "steps": (1.0,), "tokens": (1.0,)}, values=(1.0,)),
        line([1], [1.0]),
    ]
    assert common_axes(both) == ["tokens"]
    assert common_axes(both[:1]) == ["tokens", "steps", "epochs"]


@given(st.integers(3, 40), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_largest_triangles_keeps_ends_order_and_limit(most: int, values: list[float]) -> None:
    x = np.arange(len(values), dtype=float)
    kept = largest_triangles(x, np.array(values), most)
    assert len(kept) <= max(most, 1) and kept[0] == 0 and kept[-1] == len(values) - 1
    assert (np.diff(kept) > 0).all()


def test_a_spike_survives() -> None:
    values = np.zeros(10_000)
    values[4321] = 7.0
    kept = largest_triangles(np.arange(10_000.0), values, 100)
    assert 4321 in kept and len(kept) == 100
