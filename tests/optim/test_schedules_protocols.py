"""Protocols: what serves each budget, with which rates, from which state, at which cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.optim.schedules.protocols import protocol
from torchstone.optim.schedules.warmup_then import CosineConfig
from torchstone.optim.schedules.wsd_s import wsd_s

NAMES = ("wsd-s", "wsd", "cyclic-cosine", "constant", "oracle")
RELEASED = (12_500, 25_000, 50_000)
budgets = st.lists(st.integers(10, 60), min_size=1, max_size=4).map(
    lambda gaps: [sum(gaps[: i + 1]) for i in range(len(gaps))]
)


def test_the_released_layouts():
    """Switch points of the published configurations: equal total compute, and stable steps equal to those of WSD."""
    for equal, switches in (
        ("compute", [11_250, 12_500, 22_500, 25_000, 45_000, 50_000]),
        ("stable", [11_250, 12_500, 23_750, 26_250, 48_750, 53_750]),
    ):
        found = protocol("wsd-s", RELEASED, warmup=2000, shape="linear", equal=equal)
        factors = [factor for segment in found.segments for factor in segment.factors]
        # the first step of a decay still has the peak; the last one is above the floor
        falls = [step for step in range(2001, found.total) if factors[step] < factors[step - 1] == 1]
        rises = [step for step in range(2001, found.total) if factors[step] > factors[step - 1]]
        assert sorted([*(step - 1 for step in falls), *rises, found.total]) == switches
    stable = protocol("wsd", RELEASED, warmup=2000, equal="stable")
    assert [segment.end for segment in stable.segments if segment.serves is None] == [11_250, 22_500, 45_000]


def test_equal_compute_leaves_wsd_without_its_thrown_away_decays():
    found = protocol("wsd", RELEASED, warmup=2000)
    assert [found.behind(budget) for budget in range(3)] == [12_500, 25_000 - 1250, 50_000 - 1250 - 2500]
    assert [found.spent(budget) for budget in range(3)] == list(RELEASED)


@given(budgets, st.integers(0, 3), st.sampled_from(["budget", "cycle"]), st.sampled_from(["compute", "stable"]))
def test_the_cost_is_equal_and_every_segment_goes_on_where_its_parent_ends(steps, warmup, decay_of, equal):
    try:
        plans = {name: protocol(name, steps, warmup=warmup, decay_of=decay_of, equal=equal) for name in NAMES}
    except ConfigError as error:
        assert "exceeds" in str(error)  # a tenth of a late budget is longer than its cycle
        return
    for found in plans.values():
        for index, segment in enumerate(found.segments):
            assert segment.factors
            assert segment.begin == (0 if segment.parent is None else found.segments[segment.parent].end)
            assert segment.parent is None or segment.parent < index
        assert [found.serving(budget).serves for budget in range(len(steps))] == list(range(len(steps)))
        assert found.spent(len(steps) - 1) == found.total
    for budget in range(len(steps)):
        spent = {plans[name].spent(budget) for name in NAMES if name != "oracle"}
        assert spent == {plans["oracle"].behind(budget)}
        if equal == "compute":
            assert spent == {steps[budget]}
        else:
            assert plans["wsd"].behind(budget) == steps[budget]
            assert stable_steps(plans["wsd"], budget) == stable_steps(plans["wsd-s"], budget)


def stable_steps(found, budget):
    """Steps at the peak behind a checkpoint."""
    segment, count = found.serving(budget), 0
    while True:
        count += sum(factor == 1 for factor in segment.factors)
        if segment.parent is None:
            return count
        segment = found.segments[segment.parent]


def test_the_rates_are_those_of_the_schedules():
    ends, steps = (20, 50), 50
    sawtooth = wsd_s(steps, ends=ends, warmup=2, decay_of="budget", shape="linear")
    found = protocol("wsd-s", ends, warmup=2, shape="linear")
    assert [f for segment in found.segments for f in segment.factors] == [
        sawtooth.factor(step) for step in range(steps)
    ]
    cosine = CosineConfig(warmup=2).build(20)
    for name in ("cyclic-cosine", "oracle"):
        first = protocol(name, ends, warmup=2).segments[0]
        assert first.factors[:2] == (0.0, 0.5)  # the warmup of WSD-S, not that of `cosine`
        assert first.factors[2:] == tuple(cosine.factor(step) for step in range(2, 20))
    assert set(protocol("constant", ends).segments[1].factors) == {1.0}
    plateau, decay, *_ = protocol("wsd", ends, warmup=2, shape="linear").segments
    assert plateau.factors + decay.factors == tuple(sawtooth.factor(step) for step in range(20))


def test_all_protocols_warm_up_alike():
    for name in NAMES:
        found = protocol(name, (20, 50), warmup=4)
        begins = [segment.factors[:5] for segment in found.segments if segment.begin == 0]
        assert begins == [(0.0, 0.25, 0.5, 0.75, 1.0)] * (2 if name == "oracle" else 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"name": "wsdx"},
            "no protocol 'wsdx' with equal 'compute'; protocols: wsd-s, wsd, cyclic-cosine, constant, oracle",
        ),
        ({"equal": "time"}, "with equal 'time'.*equal: compute, stable"),
        ({"budgets": []}, "at least one budget"),
        ({"budgets": [20, 10]}, r"budgets were given as \[20, 10\], which do not increase"),
        ({"budgets": [50, 20, 50]}, "do not increase; give them in order, each once"),
        ({"budgets": [20, 50.5]}, r"budgets were given as \[20, 50.5\]; each is a whole number of steps above 0"),
        ({"budgets": [0, 50]}, "each is a whole number of steps above 0"),
        ({"warmup": -1}, "warmup was given as -1; it is a whole number of steps, 0 or more"),
        ({"warmup": 2.5}, "warmup was given as 2.5; it is a whole number of steps"),
        ({"decay": -0.1}, "decay was given as -0.1; .* above 0"),
        ({"decay": float("nan")}, "decay was given as nan"),
        ({"decay_of": "run"}, "decay_of was given as 'run'; it is one of cycle, budget"),
        ({"shape": "square"}, "no shape 'square' of a decay; shapes: inv, linear"),
        ({"floor": 1.5}, "floor was given as 1.5; it is a multiple of the peak from 0 to 1"),
        ({"floor": -0.1}, "floor was given as -0.1"),
        ({"floor": 0.0}, "shape inv never reaches floor 0; give a floor above 0"),
        ({"floor": 0.0, "shape": "exponential"}, "shape exponential never reaches floor 0"),
        ({"warmup": 18, "decay": 5}, "cycle 0: warmup 18 \\+ decay 5 exceeds 20 steps"),
        ({"decay": 1.5}, "neither a fraction"),
        ({"decay": 0.01}, "decay 0.01 comes to no step before the budget of 20 steps"),
    ],
)
def test_protocols_that_cannot_be_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        protocol(**{"name": "wsd-s", "budgets": [20, 50], **given})
