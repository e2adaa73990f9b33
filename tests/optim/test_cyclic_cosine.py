"""Cyclic cosine: every cycle is a cosine of its own, one cycle is `cosine`."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Stage
from torchstone.optim.schedules.cyclic_cosine import CyclicCosineConfig
from torchstone.optim.schedules.warmup_then import CosineConfig


@given(steps=st.integers(2, 300), warmup=st.floats(0, 0.9), final=st.floats(0, 1))
def test_one_cycle_is_the_cosine_bit_for_bit(steps, warmup, final):
    count = float(int(warmup * steps))
    warmup = count if count > 1 else 0.0
    one = CyclicCosineConfig(warmup=warmup, final=final).build(steps)
    other = CosineConfig(warmup=warmup, final=final).build(steps)
    assert one.first_change(other, steps + 3) is None


def test_every_cycle_falls_to_the_floor_and_the_next_begins_at_the_peak():
    schedule = CyclicCosineConfig(cycles=(10, 30), warmup=0, final=0.2).build(60)
    assert [schedule.factor(step) for step in (0, 9, 10, 29, 30, 59, 99)] == pytest.approx(
        [1, 0.2, 1, 0.2, 1, 0.2, 0.2]
    )
    second = CosineConfig(warmup=0, final=0.2).build(20)
    assert [schedule.factor(step) for step in range(10, 30)] == [second.factor(step) for step in range(20)]
    assert schedule.checkpoints() == (10, 30, 60)


def test_a_rewarmup_rises_from_the_floor():
    schedule = CyclicCosineConfig(cycle_length=20, warmup=0.2, rewarmup=4, final=0.2).build(40)
    assert [schedule.factor(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert [schedule.factor(step) for step in range(20, 25)] == pytest.approx([0.4, 0.6, 0.8, 1, 1])
    assert schedule.stages()[:3] == (Stage("warmup", 0, 4), Stage("decay", 4, 20), Stage("warmup", 20, 24))


def test_an_appended_cycle_is_made_by_the_same_settings():
    schedule = CyclicCosineConfig(cycles=(30,), warmup=0, rewarmup=0.1).build(50)
    assert schedule.extend(90) == CyclicCosineConfig(cycles=(30, 50), warmup=0, rewarmup=0.1).build(90)


def test_cycles_that_fit_no_run_are_refused():
    with pytest.raises(ConfigError, match="cycle 1: 20 steps of warmup leave nothing of 20 steps"):
        CyclicCosineConfig(cycles=(30,), rewarmup=20).build(50)
    with pytest.raises(ValidationError, match="cycles and cycle_length both say"):
        CyclicCosineConfig(cycles=2, cycle_length=10)
    with pytest.raises(ConfigError, match="beyond the run of 20 steps"):
        CyclicCosineConfig(cycles=(30,)).build(20)
