"""WSD-S: both readings at every border, the ways to give cycles, appended cycles, and settings that fit no run."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Stage
from torchstone.optim.schedules.wsd_s import WSDSConfig, wsd_s
from torchstone.recipe.registry import parse_part


def factors(schedule):
    return [schedule.factor(step) for step in range(schedule.steps)]


def test_the_released_layout():
    """Budgets of 12.5k, 25k and 50k steps, a tenth of each budget decayed, in a straight line to a tenth of the peak."""
    schedule = wsd_s(50_000, ends=[12_500, 25_000], peak=6e-4, warmup=2000, decay_of="budget", shape="linear")
    assert schedule.checkpoints() == (12_500, 25_000, 50_000)
    assert [stage.begin for stage in schedule.stages() if stage.name == "decay"] == [11_250, 22_500, 45_000]
    assert schedule.lr(0) == 0 and schedule.lr(2000) == schedule.lr(11_250) == schedule.lr(12_500) == 6e-4
    assert schedule.lr(11_875) == pytest.approx(0.55 * 6e-4)
    assert schedule.lr(12_499) == pytest.approx(6e-4 * (1 - 0.9 * 1249 / 1250))


def test_the_shape_of_the_paper_is_a_straight_line_in_one_over_the_rate():
    schedule = wsd_s(200, warmup=0, decay=100, floor=0.05)
    inverse = [1 / schedule.factor(step) for step in range(100, 200)]
    assert inverse[0] == pytest.approx(inverse[1])  # as in the published code
    steps = [later - earlier for earlier, later in zip(inverse[1:], inverse[2:], strict=False)]
    assert steps == pytest.approx([19 / 100] * 98)


@pytest.mark.parametrize(
    ("shape", "halfway"),
    [
        ("inv", 1 / 2.5),
        ("linear", 0.625),
        ("cosine", 0.625),
        ("exponential", 0.5),
        ("sqrt", 1 - 0.75 * math.sqrt(0.5)),
        ("constant", 1.0),
    ],
)
def test_every_shape_at_its_middle(shape, halfway):
    schedule = wsd_s(20, warmup=0, decay=8, shape=shape, floor=0.25)
    assert schedule.factor(11) == 1.0 and schedule.factor(16) == pytest.approx(halfway)
    assert schedule.factor(19) == schedule.factor(500) >= 0.25


def test_the_readings_differ_at_a_border():
    given = {"ends": [10, 20], "decay": 4, "shape": "linear", "floor": 0.2}
    levanter, olmo = wsd_s(30, **given), wsd_s(30, style="olmo", **given)
    assert factors(levanter)[5:11] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 1])
    assert factors(olmo)[5:11] == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2])
    assert factors(olmo)[11] == 1.0
    assert levanter.checkpoints() == olmo.checkpoints() == (10, 20, 30)
    assert levanter.stages()[1:3] == (Stage("decay", 6, 10), Stage("stable", 10, 16))
    assert olmo.stages()[1:3] == (Stage("decay", 6, 11), Stage("stable", 11, 16))
    assert [olmo.factor(step) for step in (29, 30, 31, 99)] == pytest.approx([0.4, 0.2, 0.2, 0.2])


def test_a_rewarmup_rises_from_the_floor():
    schedule = wsd_s(40, ends=[20, 40], warmup=4, rewarmup=0.25, decay=5, floor=0.2)
    assert factors(schedule)[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert factors(schedule)[20:26] == pytest.approx([0.2, 0.36, 0.52, 0.68, 0.84, 1])


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({}, (330,)),
        ({"cycles": 3}, (110, 220, 330)),
        ({"cycles": 4}, (82, 165, 247, 330)),
        ({"ends": [100, 250]}, (100, 250, 330)),
        ({"ends": [100, 330]}, (100, 330)),
        ({"cycle_length": 100}, (100, 200, 330)),
        ({"cycle_length": 110}, (110, 220, 330)),
        ({"cycle_length": 0.25}, (82, 164, 246, 330)),
        ({"cycle_length": "50%"}, (165, 330)),
        ({"cycle_length": [100, 100]}, (100, 200, 330)),
        ({"cycle_length": [100, 230]}, (100, 330)),
        ({"cycle_length": 400}, (330,)),
    ],
)
def test_the_ways_to_give_the_ends(given, ends):
    assert wsd_s(330, **given).checkpoints() == ends


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"warmup": 30, "decay": 80}, "^cycle 0: warmup 30 \\+ decay 80 exceeds 100 steps; shorten"),
        ({"ends": [40], "decay": 50}, "^cycle 0: warmup 0 \\+ decay 50 exceeds 40 steps"),
        ({"ends": [40], "rewarmup": 30, "decay": 35}, "^cycle 1: warmup 30 \\+ decay 35 exceeds 60 steps"),
        ({"style": "olmo", "ends": [60], "decay": 50}, "^cycle 1: warmup 0 \\+ decay 50 exceeds 40 steps"),
        ({"ends": [50, 40]}, "cycle 1 would begin after 50 steps and end after 40: ends do not increase"),
        ({"ends": [50, 50]}, "do not increase"),
        ({"ends": [50, 150]}, "end after 150 steps, beyond the run of 100 steps"),
        ({"cycle_length": [80, 80]}, "end after 160 steps, beyond the run of 100 steps"),
        ({"cycles": 200}, "cycles asks for 200 cycles"),
        ({"decay": 1.5}, "decay 1.5 is neither a fraction up to 1 nor a whole number of steps; write 0.1 or \"10%\""),
        ({"warmup": 2.5}, "warmup 2.5 is neither a fraction up to 1"),
        ({"cycle_length": 1.5}, "cycle_length 1.5 is neither a fraction up to 1"),
        ({"cycle_length": 0.001}, "cycle_length 0.001 is no whole step of a run of 100 steps"),
        ({"floor": 0}, "shape inv never reaches final 0; give a final above 0 .0.1 is the paper's., or another shape"),
        ({"floor": 0, "shape": "exponential"}, "shape exponential never reaches final 0"),
        ({"cycles": 2, "cycle_length": 10}, "cycles and cycle_length both say where the cycles end; give one of them"),
        ({"ends": [10], "cycle_length": 10}, "cycles and cycle_length both say"),
        ({"ends": [10], "cycles": 2}, "ends and cycles both say"),
        ({"cycles": 10**9}, "cycles asks for 1,000,000,000 cycles, and the run has 100 steps"),
        ({"ends": range(1, 300)}, "cycles asks for 299 cycles, and the run has 100 steps"),
        ({"cycle_length": [1] * 101}, "cycle_length asks for 101 cycles, and the run has 100 steps"),
        ({"ends": 50}, "ends is 50, and should be a list"),
        ({"peak": -1.0}, "a peak of -1.0 is no rate"),
        ({"peak": float("nan")}, "a peak of nan is no rate"),
        ({"warmup": float("inf")}, "warmup: Input should be a finite number"),
        ({"cycles": 0}, "cycles 0 holds no cycle"),
        ({"cycle_length": [10, 0]}, "cycle_length .10, 0. holds no cycle"),
        ({"decay": "ten"}, "decay: .*number"),
        ({"decay": "x%"}, "decay: .*number"),
        ({"floor": 1.5}, "final: .*less than or equal to 1"),
        ({"shape": "steep"}, "shape: .*'inv'"),
        ({"teeth": 3}, "teeth: "),
        ({"peaks": [1.0]}, "peaks of single cycles are there with style olmo alone"),
        ({"style": "olmo", "shape": "inv"}, "style olmo decays in a straight line; shape inv"),
        ({"style": "olmo", "rewarmup": 5}, "style olmo warms up once"),
        ({"style": "olmo", "decay_of": "budget"}, "style olmo takes fractions of each period"),
        ({"style": "olmo", "ends": [50], "peaks": [1.0]}, "1 peaks do not fit 2 periods"),
        ({"style": "olmo", "peaks": [0.0]}, "peaks are above 0; given: 0"),
        ({"style": "olmo", "decay": 1.5}, "decay 1.5 is neither a fraction below 1"),
    ],
)  # fmt: skip
def test_settings_that_fit_no_run_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        wsd_s(100, **given)


def test_a_longer_run_appends_a_cycle_by_the_same_settings():
    schedule = wsd_s(100, ends=[40], peak=1.0, warmup=5, rewarmup=2, decay="25%")
    longer = schedule.extend(180)
    assert longer == wsd_s(180, ends=[40, 100], peak=1.0, warmup=5, rewarmup=2, decay="25%")
    budget = wsd_s(100, ends=[40], decay_of="budget").extend(180)
    assert budget.decays == (4, 10, 18)
    with pytest.raises(ConfigError, match="cycle 2: warmup 0 \\+ decay 20 exceeds 10 steps"):
        wsd_s(100, ends=[40], decay=20).extend(110)


def test_periods_may_have_peaks_of_their_own():
    schedule = wsd_s(60, ends=[20, 40], style="olmo", peaks=[1.0, 0.5, 2.0], decay=5, floor=0.1)
    assert [schedule.factor(step) for step in (10, 20, 21, 40, 41)] == pytest.approx([1, 0.1, 0.5, 0.1, 2])
    assert schedule.factor(57) == pytest.approx(0.1 + 1.9 * 3 / 5)
    assert schedule.extend(80).peaks == (1.0, 0.5, 2.0, 2.0)


@given(st.integers(1, 100), st.integers(1, 400))
def test_a_percentage_is_its_fraction(percent, steps):
    assert WSDSConfig(decay=f"{percent}%", warmup=0) == WSDSConfig(decay=percent / 100, warmup=0)
    assert wsd_s(steps, decay=f"{percent} %").decays == (int(percent / 100 * steps),)


def test_settings_of_other_kinds_carry_over_where_they_mean_the_same():
    previous = {"kind": "wsd", "warmup": 30.0, "decay": 0.2, "shape": "sqrt", "final": 0.2, "initial": 0.1}
    assert WSDSConfig.inherit(previous) == {"warmup": 30.0, "shape": "sqrt", "final": 0.2, "initial": 0.1}
    assert WSDSConfig.inherit({"kind": "cosine", "warmup": 0.05, "final": 0.1}) == {"final": 0.1}
    assert WSDSConfig.inherit({"kind": "cyclic-cosine", "warmup": 0.2, "cycles": 2}) == {"warmup": 0.2, "cycles": 2}


def test_it_round_trips_as_a_part():
    part = parse_part(
        "schedule", {"kind": "wsd-s", "cycle_length": [10, 20], "decay": "5%", "shape": "linear", "final": 0}
    )
    assert parse_part("schedule", part.model_dump(mode="json")) == part
    with pytest.raises(ValidationError, match="a number is due, not true or false"):
        WSDSConfig(decay=True)


def test_a_rate_costs_microseconds():
    """With a hundred cycles too; the bound leaves room for a machine on which other things run."""
    schedule = wsd_s(100_000, ends=list(range(1000, 100_000, 1000)), peak=1e-3, warmup=100)
    fastest = math.inf
    for _ in range(5):
        begun = time.perf_counter()
        for step in range(0, 100_000, 10):
            schedule.lr(step)
        fastest = min(fastest, time.perf_counter() - begun)
    assert fastest / 10_000 < 20e-6
