"""Schedules are functions of the step: warmup, shape, final factor, whatever the length of the run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Stage, consecutive, warmup_steps
from torchstone.optim.schedules.warmup_then import ConstantConfig, CosineConfig, LinearConfig

SHAPES = [ConstantConfig, LinearConfig, CosineConfig]


def factors(config, steps):
    schedule = config.build(steps)
    return [schedule.factor(step) for step in range(steps)]


@pytest.mark.parametrize("shape", SHAPES)
@given(steps=st.integers(1, 400), warmup=st.floats(0, 0.9))
def test_factors_rise_to_one_and_never_rise_again(shape, steps, warmup):
    if round(warmup * steps) >= steps:
        return
    found = factors(shape(warmup=warmup), steps)
    top = max(round(warmup * steps) - 1, 0)
    assert all(0 <= factor <= 1 for factor in found)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    if round(warmup * steps):
        assert found[top] == 1.0 and found[0] > 0


@pytest.mark.parametrize("shape", [LinearConfig, CosineConfig])
def test_the_last_step_has_the_final_factor(shape):
    found = factors(shape(warmup=4, final=0.25), 20)
    assert found[3] == found[4] == 1.0
    assert found[-1] == pytest.approx(0.25)
    assert shape(warmup=4, final=0.25).build(20).factor(500) == pytest.approx(0.25)


def test_values_halfway():
    assert factors(LinearConfig(warmup=0, final=0.2), 5)[2] == pytest.approx(0.6)
    assert factors(CosineConfig(warmup=0, final=0.0), 5)[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factors(ConstantConfig(warmup=2), 5) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_warmup_is_a_fraction_below_one_and_a_number_of_steps_from_one_on():
    assert (warmup_steps(0.1, 50), warmup_steps(1, 50), warmup_steps(7, 50), warmup_steps(0, 50)) == (5, 1, 7, 0)


@pytest.mark.parametrize("warmup, steps, word", [(2.5, 50, "whole number"), (50, 50, "leave nothing"), (80, 50, "80")])
def test_a_warmup_that_fits_no_run_is_refused(warmup, steps, word):
    with pytest.raises(ConfigError, match=word):
        CosineConfig(warmup=warmup).build(steps)


def test_one_step_runs_at_the_peak_or_final_rate():
    assert factors(ConstantConfig(warmup=0), 1) == [1.0]
    assert all(0 < factors(shape(warmup=0), 1)[0] <= 1 for shape in (CosineConfig,))


@pytest.mark.parametrize("shape, rest", [(ConstantConfig, "stable"), (LinearConfig, "decay"), (CosineConfig, "decay")])
def test_stages_are_named_ranges_without_gaps(shape, rest):
    assert shape(warmup=0.1).build(50).stages() == (Stage("warmup", 0, 5), Stage(rest, 5, 50))
    assert shape(warmup=7).build(50).stages() == (Stage("warmup", 0, 7), Stage(rest, 7, 50))
    assert shape(warmup=0).build(50).stages() == (Stage(rest, 0, 50),)


def test_stages_without_steps_are_left_out():
    assert consecutive(("a", 2), ("b", 0), ("a", 3)) == (Stage("a", 0, 2), Stage("a", 2, 5))
    assert consecutive(("a", 0)) == ()
