"""WSD: the curve at every step, its stages, and settings that fit no run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Stage
from torchstone.optim.schedules.wsd import WSDConfig
from torchstone.recipe.registry import parse_part

SHAPES = ["exponential", "linear", "cosine", "sqrt"]


def factors(steps, **settings):
    schedule = WSDConfig(**settings).build(steps)
    return [schedule.factor(step) for step in range(steps)]


def test_the_schedule_of_jetmoe():
    """Counted in billions of tokens, one a step: 10 of warmup from 10 %, then 1, then 0.1^((s−S)/D) over the last 250."""
    found = factors(1250, warmup=10, decay=250, initial=0.1)
    assert found[:10] == pytest.approx([0.1 + 0.09 * s for s in range(1, 11)])
    assert found[10:1000] == [1.0] * 990
    assert found[1000:] == pytest.approx([0.1 ** ((s - 1000) / 250) for s in range(1001, 1251)], rel=1e-14)
    assert found[1124] == pytest.approx(math.sqrt(0.1)) and found[-1] == 0.1


@pytest.mark.parametrize(
    "shape, halfway",
    [("exponential", 0.5), ("linear", 0.625), ("cosine", 0.625), ("sqrt", 1 - 0.75 * math.sqrt(0.5))],
)
def test_each_shape_halfway_and_at_the_end(shape, halfway):
    found = factors(20, warmup=0, decay=8, shape=shape, final=0.25)
    assert found[:12] == [1.0] * 12
    assert found[15] == pytest.approx(halfway) and found[19] == 0.25
    assert WSDConfig(warmup=0, decay=8, shape=shape, final=0.25).build(20).factor(500) == 0.25


@given(
    shape=st.sampled_from(SHAPES),
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0.001, 0.499),
    final=st.floats(1e-6, 1),
    initial=st.floats(0, 1),
)
def test_it_rises_stays_and_falls_and_its_stages_say_when(shape, steps, warmup, decay, final, initial):
    config = WSDConfig(warmup=warmup, decay=decay, shape=shape, final=final, initial=initial)
    schedule = config.build(steps)
    stages = schedule.stages()
    assert [step for stage in stages for step in range(stage.begin, stage.end)] == list(range(steps))
    assert all(stage.begin < stage.end for stage in stages)
    found = {stage.name: [schedule.factor(step) for step in range(stage.begin, stage.end)] for stage in stages}
    rise, stay, fall = (found.get(name, []) for name in ("warmup", "stable", "decay"))
    assert len(rise) == round(warmup * steps) and len(fall) == round(decay * steps)
    assert rise == sorted(rise) and all(initial <= factor <= 1 + 1e-15 for factor in rise)
    assert rise[-1:] in ([], [pytest.approx(1.0)])
    assert set(stay) <= {1.0}
    assert fall == sorted(fall, reverse=True) and all(final <= factor <= 1 + 1e-15 for factor in fall)
    assert fall[-1:] in ([], [final])


def test_fractions_and_steps_give_the_same_stages():
    expected = (Stage("warmup", 0, 5), Stage("stable", 5, 80), Stage("decay", 80, 100))
    assert WSDConfig(warmup=0.05, decay=0.2).build(100).stages() == expected
    assert WSDConfig(warmup=5, decay=20).build(100).stages() == expected
    assert WSDConfig(warmup=0, decay=1).build(3).stages() == (Stage("stable", 0, 2), Stage("decay", 2, 3))
    assert WSDConfig(warmup=1, decay=2).build(3).stages() == (Stage("warmup", 0, 1), Stage("decay", 1, 3))
    assert factors(3, warmup=0, decay=1, final=0.5) == [1.0, 1.0, 0.5]


def test_warmup_and_decay_longer_than_the_run_are_refused_with_their_numbers():
    message = r"30 steps of warmup and 80 steps of decay are longer than the run of 100 steps.*schedule\.decay"
    with pytest.raises(ConfigError, match=message):
        WSDConfig(warmup=30, decay=80).build(100)
    with pytest.raises(ConfigError, match="30 steps of warmup and 80 steps of decay"):
        WSDConfig(warmup=0.3, decay=0.8).build(100)
    with pytest.raises(ConfigError, match="101 steps of decay"):
        WSDConfig(warmup=0, decay=101).build(100)
    with pytest.raises(ConfigError, match=r"decay 2\.5 is neither a fraction below 1 nor a whole number"):
        WSDConfig(decay=2.5).build(100)
    assert len(WSDConfig(warmup=20, decay=80).build(100).stages()) == 2


def test_an_exponential_decay_to_zero_is_refused_and_others_reach_it():
    with pytest.raises(ValidationError, match="never reaches final 0; give a final above 0"):
        WSDConfig(final=0.0)
    for shape in ("linear", "cosine", "sqrt"):
        assert factors(10, decay=5, shape=shape, final=0.0)[-1] == 0.0


def test_it_round_trips_as_a_part():
    part = parse_part("schedule", {"kind": "wsd", "decay": 0.1, "shape": "sqrt", "final": 0})
    assert parse_part("schedule", part.model_dump(mode="json")) == part
