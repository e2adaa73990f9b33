"""Loss on lines: exact on a quadratic, barrier and chord, valley crossing, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchstone.diagnose.landscape.interpolate import LossLine, interpolate, line_of_alphas, loss_of, walk
from torchstone.errors import ConfigError, DataError


def valley(state: dict[str, Tensor]) -> float:
    """A river along x whose bed falls, with steep slopes across."""
    x, y = state["w"].tolist()
    return 10 * y * y - x


def at(x: float, y: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([x, y], dtype=torch.float64)}


def test_losses_are_those_of_the_points_on_the_line() -> None:
    line = interpolate(at(0, 1), at(2, -1), [-0.25, 0.75, 1.25], valley)
    assert line.alphas == (-0.25, 0.0, 0.5, 0.75, 1.0, 1.25)
    for alpha, loss in zip(line.alphas, line.losses, strict=True):
        assert loss == pytest.approx(10 * (1 - 2 * alpha) ** 2 - 2 * alpha, abs=1e-12)


def test_two_points_of_the_river_have_no_barrier_and_two_on_the_slopes_a_lower_middle() -> None:
    river = interpolate(at(0, 0), at(2, 0), line_of_alphas(), valley)
    assert (
        river.barrier == pytest.approx(0.0, abs=1e-12) and river.bulge == pytest.approx(0.0, abs=1e-12) and river.falls
    )
    slopes = interpolate(at(0, 1), at(2, -1), line_of_alphas(), valley)
    assert slopes.barrier == 0.0 and slopes.bulge < 0 and not slopes.falls
    assert slopes.midpoint == pytest.approx(-1.0 - 8.0)


def test_a_hill_is_a_barrier_above_the_chord_between_unequal_ends() -> None:
    line = LossLine((-0.5, 0.0, 0.25, 0.5, 1.0, 1.5), (99.0, 2.0, 2.5, 1.5, 0.0, 99.0))
    assert line.barrier == line.bulge == pytest.approx(2.5 - 1.5)
    assert line.midpoint == 1.5 and not line.falls and line.climb == 0.5
    assert LossLine((0.0, 0.5, 1.0), (2.0, 1.9, 0.0)).climb == pytest.approx(
        -0.1
    )  # above the chord, and downhill all the same
    assert LossLine((0.0, 0.5, 1.0), (1.0, 1.4, 2.0)).climb == pytest.approx(0.4)  # the end is higher than the start


def test_the_default_line_reaches_beyond_both_ends() -> None:
    alphas = line_of_alphas()
    assert alphas[0] == -0.25 and alphas[-1] == 1.25 and {0.0, 0.5, 1.0} <= set(alphas)
    assert line_of_alphas(points=1) == (-0.25,) and line_of_alphas(0, 1, 3) == (0.0, 0.5, 1.0)
    with pytest.raises(ConfigError, match="points was given as 0; a line is measured at 1 point at least"):
        line_of_alphas(points=0)


def test_modules_are_interpolated_through_a_model_that_keeps_its_own_weights() -> None:
    torch.manual_seed(0)
    a, b, used = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        b.weight.fill_(3.0)
        b.running_var.fill_(4.0)
        b.num_batches_tracked.fill_(9)
    seen = []

    def measure() -> float:
        seen.append((used.weight[0].item(), used.running_var[0].item(), int(used.num_batches_tracked)))
        return 0.0

    interpolate(a, b, [0.5], loss_of(used, measure))
    assert seen == [(1.0, 1.0, 0), (2.0, 2.5, 0), (3.0, 4.0, 0)]
    assert used.weight[0].item() == 1.0


def test_a_walk_goes_along_a_direction_and_leaves_other_tensors() -> None:
    origin = {**at(0, 0), "count": torch.tensor(2)}
    seen = walk(origin, at(1, 1), [0.0, 0.5, 2.0], lambda state: valley(state) + float(state["count"]))
    assert seen == pytest.approx((2.0, 10 * 0.25 - 0.5 + 2, 40 - 2 + 2))


def test_bad_lines_are_refused() -> None:
    with pytest.raises(ConfigError, match="alphas holds nan"):
        interpolate(at(0, 0), at(1, 1), [float("nan")], valley)
    with pytest.raises(DataError, match="the loss at α = 0.5 is inf"):
        interpolate(at(0, 0), at(1, 1), [], lambda state: float("inf") if float(state["w"][0]) == 0.5 else 1.0)
    with pytest.raises(ConfigError, match="not of one architecture"):
        interpolate(at(0, 0), {"w": torch.zeros(3)}, [], valley)
