"""The theory of one noisy slope against simulated chains, and the area under a schedule."""

from __future__ import annotations

import numpy as np
import pytest

from torchstone.errors import ConfigError
from torchstone.optim.schedules.theory import greedy_rate, next_variance, plateau_loss, progress
from torchstone.optim.schedules.wsd_s import wsd_s

CHAINS = 100_000


def step(x_n, rate, curvature, noise, random):
    """One step of stochastic gradient descent on every chain."""
    return x_n - rate * (curvature * x_n + np.sqrt(noise) * random.standard_normal(x_n.shape))


@pytest.mark.parametrize(("rate", "curvature", "noise"), [(0.1, 1.0, 1.0), (0.5, 2.0, 0.3), (1.5, 1.0, 4.0)])
def test_the_height_of_the_plateau(rate, curvature, noise):
    random, x_n = np.random.default_rng(0), np.zeros(CHAINS)
    for _ in range(60):
        x_n = step(x_n, rate, curvature, noise, random)
    settled = np.mean([
        0.5 * curvature * np.mean((x_n := step(x_n, rate, curvature, noise, random)) ** 2) for _ in range(40)
    ])  # fmt: skip
    assert settled == pytest.approx(plateau_loss(rate, curvature, noise), rel=0.01)


@pytest.mark.parametrize(("curvature", "noise"), [(1.0, 1.0), (0.5, 3.0)])
def test_the_greedy_rate_is_the_best_one_on_simulated_chains(curvature, noise):
    random = np.random.default_rng(1)
    x_n = np.sqrt(2.0) * random.standard_normal(CHAINS)
    rate = greedy_rate(2.0, curvature, noise)
    found = {}
    for times in (0.8, 1.0, 1.25):
        found[times] = np.mean(step(x_n, times * rate, curvature, noise, np.random.default_rng(2)) ** 2)
        assert found[times] == pytest.approx(next_variance(times * rate, 2.0, curvature, noise), rel=0.01)
    assert found[1.0] == min(found.values())


def test_greedy_rates_are_a_straight_line_in_one_over_the_rate():
    curvature, noise, variance = 0.7, 2.0, 5.0
    inverse = []
    for _ in range(50):
        rate = greedy_rate(variance, curvature, noise)
        inverse.append(1 / rate)
        variance = next_variance(rate, variance, curvature, noise)
    assert np.diff(inverse) == pytest.approx(curvature, rel=1e-9)


def test_the_greedy_course_lowers_simulated_chains_as_predicted():
    curvature, noise, random = 1.0, 1.0, np.random.default_rng(3)
    variance = 2 * plateau_loss(0.5, curvature, noise) / curvature
    x_n = np.sqrt(variance) * random.standard_normal(CHAINS)
    for _ in range(20):
        rate = greedy_rate(variance, curvature, noise)
        x_n, variance = step(x_n, rate, curvature, noise, random), next_variance(rate, variance, curvature, noise)
    assert np.mean(x_n**2) == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize(("rate", "curvature"), [(0.0, 1.0), (2.0, 1.0), (0.1, 0.0)])
def test_rates_without_a_plateau_are_refused(rate, curvature):
    with pytest.raises(ConfigError, match="there is no plateau; give a curvature above 0"):
        plateau_loss(rate, curvature, 1.0)


def test_progress_is_the_area_under_the_schedule():
    schedule = wsd_s(40, ends=[20], warmup=4, decay=5, shape="linear")
    area = progress(schedule)
    assert len(area) == 41 and area[0] == 0
    assert np.diff(area) == pytest.approx([schedule.factor(step) for step in range(40)])
    assert area[20] == pytest.approx(1.5 + 11 + 5 * 0.64 + 0.0)
