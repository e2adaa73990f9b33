"""Laws of every kind of schedule: bounds, stages, checkpoints, rates, longer plans, stored plans."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.errors import CheckpointError, ConfigError
from torchstone.optim.schedules.base import Schedule
from torchstone.optim.schedules.inverse_sqrt import InverseSqrt
from torchstone.optim.schedules.warmup_then import CosineConfig
from torchstone.recipe.registry import kinds, parse_part, part_class
from torchstone.recipe.yaml import dump_yaml

FLOORED = ("inv", "exponential")
SHAPES = ("linear", "cosine", "sqrt", "constant", *FLOORED)
CYCLIC = ("wsd-s", "cyclic-cosine")
amounts = st.one_of(st.just(0.0), st.floats(0.001, 0.3))


@st.composite
def parts(draw, kind=None):
    """A part of any kind whose cycles are long enough for its warmup and decay."""
    kind = kind or draw(st.sampled_from(kinds("schedule")))
    data = {"kind": kind, "warmup": draw(amounts)}
    if kind != "constant":
        data["final"] = draw(st.one_of(st.just(0.0), st.floats(0.01, 1)))
    if kind in ("wsd", "trapezoid", "inverse-sqrt", "wsd-s"):
        data["decay"] = draw(st.floats(0.001, 0.5))
    if kind == "wsd":
        data["shape"] = draw(st.sampled_from(("exponential", "linear", "cosine", "sqrt")))
    if kind in CYCLIC:
        way = draw(st.sampled_from(("cycles", "ends", "length", "fraction", "lengths", "one")))
        data |= {
            "cycles": {"cycles": draw(st.integers(1, 5))},
            "ends": {"cycles": tuple(sorted(draw(st.sets(st.integers(1, 49), min_size=1, max_size=4))))},
            "length": {"cycle_length": float(draw(st.integers(10, 60)))},
            "fraction": {"cycle_length": draw(st.floats(0.2, 1))},
            "lengths": {"cycle_length": tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))},
            "one": {},
        }[way]
    if kind == "wsd-s":
        data |= {"initial": draw(st.floats(0, 1)), "style": draw(st.sampled_from(("levanter", "olmo")))}
        if data["style"] == "levanter":
            data |= {"rewarmup": draw(amounts), "shape": draw(st.sampled_from(SHAPES))}
    if data.get("shape", "inv" if kind == "wsd-s" else "") in FLOORED and data.get("style") != "olmo":
        data["final"] = max(data["final"], 0.01)
    return parse_part("schedule", data)


@st.composite
def schedules(draw):
    return draw(parts()).build(draw(st.integers(60, 300)), 0.25)


@pytest.mark.parametrize("kind", kinds("schedule"))
def test_every_kind_has_defaults_that_build_and_survive_yaml(kind):
    part = parse_part("schedule", kind)
    assert parse_part("schedule", part.model_dump(mode="json")) == part
    assert kind in dump_yaml(part)
    assert isinstance(part.build(100), Schedule)
    assert part.build(100).peak is None


@pytest.mark.parametrize("kind", kinds("schedule"))
@pytest.mark.parametrize("after", kinds("schedule"))
def test_every_kind_may_take_the_place_of_every_other(kind, after):
    settings = {"kind": kind} if kind == "constant" else {"kind": kind, "final": 0.25}
    previous = parse_part("schedule", settings).model_dump(mode="json")
    part = parse_part("schedule", {"kind": after, **part_class("schedule", after).inherit(previous)})
    assert getattr(part, "final", 0.25) == (
        0.25 if kind != "constant" else getattr(part_class("schedule", after)(), "final", 0.25)
    )
    assert part.build(100).steps == 100


@given(schedules())
def test_factors_stay_within_their_bounds(schedule):
    assert all(0 <= schedule.factor(step) <= 1 + 1e-12 for step in range(schedule.steps + 5))


@given(schedules())
def test_stages_tile_the_run_and_a_stable_stage_is_flat(schedule):
    stages = schedule.stages()
    assert [step for stage in stages for step in range(stage.begin, stage.end)] == list(range(schedule.steps))
    assert all(stage.begin < stage.end and stage.name in ("warmup", "stable", "decay") for stage in stages)
    for stage in stages:
        found = [schedule.factor(step) for step in range(stage.begin, stage.end)]
        if stage.name == "stable":
            assert set(found) == {1.0} or (isinstance(schedule, InverseSqrt) and found == sorted(found, reverse=True))
        if stage.name == "warmup":
            assert found == sorted(found)
        if stage.name == "decay":
            assert all(later <= earlier + 1e-12 for earlier, later in zip(found, found[1:], strict=False))


@given(schedules())
def test_checkpoints_lie_in_the_run_in_order_and_end_it(schedule):
    ends = schedule.checkpoints()
    assert list(ends) == sorted(set(ends))
    assert ends[0] > 0 and ends[-1] == schedule.steps
    assert set(ends) <= set(range(1, schedule.steps + 1))


@given(schedules(), st.integers(0, 299))
def test_a_rate_is_the_peak_times_the_factor(schedule, step):
    assert schedule.lr(step) == 0.25 * schedule.factor(step)


def alike(one, other):
    """Rates that differ by rounding are the same rate."""
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-15)


@given(schedules(), st.integers(1, 200), st.floats(0, 1))
def test_a_longer_plan_keeps_every_rate_that_was_used_or_is_refused(schedule, more, share):
    done, end = int(share * schedule.steps), schedule.steps + more
    try:
        longer = schedule.extend(end, done=done)
    except ConfigError as error:
        if "exceeds" in str(error) or "leave nothing" in str(error):
            return  # the appended cycle is too short for what it should hold
        step = int(str(error).split("rate of step ")[1].split()[0])
        undone = schedule.extend(end, done=step)
        assert step < done and schedule.factor(step) != undone.factor(step)
        assert schedule.first_change(undone, done) == step
        return
    assert longer.steps == end and longer.checkpoints()[-1] == end and longer.peak == schedule.peak
    assert all(alike(longer.factor(step), schedule.factor(step)) for step in range(done))
    assert schedule.first_change(longer, done) is None


@given(parts(kind="wsd-s"), st.integers(60, 200), st.integers(60, 120))
def test_an_appended_cycle_changes_nothing_and_keeps_all_checkpoints(part, steps, more):
    schedule = part.build(steps)
    longer = schedule.extend(steps + more)
    assert longer.checkpoints() == (*schedule.checkpoints(), steps + more)
    assert all(longer.factor(step) == schedule.factor(step) for step in range(steps))


@given(schedules())
def test_a_stored_plan_is_plain_data_and_comes_back(schedule):
    state = json.loads(json.dumps(schedule.state_dict()))
    assert Schedule.from_state_dict(state) == schedule


@settings(max_examples=30)
@given(schedules(), schedules(), st.integers(0, 60))
def test_the_first_change_is_the_first_step_whose_factor_differs(one, other, before):
    found = one.first_change(other, before)
    same = [alike(one.factor(step), other.factor(step)) for step in range(before)]
    assert found == (same.index(False) if not all(same) else None)


def test_a_rate_without_a_peak_is_refused():
    with pytest.raises(
        ConfigError, match=r"knows no peak rate; build it with one, for example build\(1000, peak=6e-4\)"
    ):
        CosineConfig().build(100).lr(3)


def test_a_longer_cosine_is_refused_with_the_first_step_and_both_rates():
    schedule = CosineConfig(warmup=10, final=0.0).build(100, peak=0.5)
    with pytest.raises(
        ConfigError, match=r"the rate of step 11 changes from 0\.499\d+ to 0\.4999\d*, and 100 steps were done"
    ):
        schedule.extend(200)
    assert schedule.extend(200, done=11).lr(199) == 0.0
    with pytest.raises(
        ConfigError, match="step 11 changes from 0.99.* of the peak to 0.999.* of the peak, and 12 steps"
    ):
        CosineConfig(warmup=10, final=0.0).build(100).extend(200, done=12)


def test_wsd_may_become_longer_until_its_decay_begins():
    schedule = parse_part("schedule", {"kind": "wsd", "warmup": 10, "decay": 20}).build(100)
    assert schedule.extend(300, done=80).stages()[-1].begin == 280
    with pytest.raises(
        ConfigError, match="rate of step 80 changes from 0.89.* of the peak to 1 of the peak, and 81 steps"
    ):
        schedule.extend(300, done=81)


def test_schedules_without_an_end_in_their_rates_become_longer_at_any_time():
    for data in ({"kind": "constant", "warmup": 5}, {"kind": "inverse-sqrt", "warmup": 5}):
        schedule = parse_part("schedule", data).build(50)
        assert all(schedule.factor(step) == schedule.extend(90).factor(step) for step in range(90))


@pytest.mark.parametrize(
    "end, done, words", [(100, None, "no later than the end of 100"), (200, 101, "101 steps done do not fit")]
)
def test_ends_and_steps_that_fit_no_extension_are_refused(end, done, words):
    with pytest.raises(ConfigError, match=words):
        parse_part("schedule", "constant").build(100).extend(end, done=done)


def test_a_stored_plan_of_an_unknown_kind_or_with_other_fields_is_refused():
    state = parse_part("schedule", "wsd").build(100).state_dict()
    for wrong in ({**state, "schedule": "Sawtooth"}, {**state, "teeth": 3}, {}):
        with pytest.raises(CheckpointError, match="is none of those known here: .*WSD"):
            Schedule.from_state_dict(wrong)


def test_another_peak_is_another_plan():
    one, other = (CosineConfig(warmup=0).build(100, peak=peak) for peak in (1e-3, 2e-3))
    assert one.first_change(other, 100) is None
    with pytest.raises(ConfigError, match="rate of step 0 changes from 0.001 to 0.002, and 5 steps"):
        one.check_same(other, 5)
    one.check_same(other, 0)


def test_inverse_sqrt_is_the_schedule_of_the_transformer():
    """Equation 3 of the paper at width 512 and 4000 steps of warmup, whose peak is (512 · 4000)^-½."""
    schedule = parse_part("schedule", {"kind": "inverse-sqrt", "warmup": 4000}).build(
        100_000, peak=(512 * 4000) ** -0.5
    )
    for step in (0, 1, 1999, 3999, 4000, 9999, 99_999):
        done = step + 1
        assert schedule.lr(step) == pytest.approx(512**-0.5 * min(done**-0.5, done * 4000**-1.5), rel=1e-12)


def test_inverse_sqrt_falls_to_its_final_factor_of_the_root():
    schedule = parse_part("schedule", {"kind": "inverse-sqrt", "warmup": 4, "decay": 10, "final": 0.25}).build(100)
    assert schedule.factor(89) == pytest.approx(math.sqrt(4 / 90))
    assert schedule.factor(99) == pytest.approx(0.25 * math.sqrt(4 / 100)) == schedule.factor(500)
    assert [stage.name for stage in schedule.stages()] == ["warmup", "stable", "decay"]


def test_a_trapezoid_never_stands_still():
    schedule = parse_part("schedule", {"kind": "trapezoid", "warmup": 4, "decay": 5}).build(20)
    found = [schedule.factor(step) for step in range(20)]
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[14:] == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert schedule.factor(100) == found[-1]


@pytest.mark.parametrize("kind", ["trapezoid", "inverse-sqrt", "wsd"])
def test_warmup_and_decay_longer_than_the_run_are_refused(kind):
    with pytest.raises(
        ConfigError, match="30 steps of warmup and 80 steps of decay are longer than the run of 100 steps"
    ):
        parse_part("schedule", {"kind": kind, "warmup": 30, "decay": 80}).build(100)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        parse_part("schedule", {"kind": kind, "warmup": -1})
