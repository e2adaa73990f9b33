"""Matching arms: exact where it can be, refused where it cannot."""

from __future__ import annotations

import pytest
from tiny import tiny_recipe

from torchstone.errors import BudgetError, ConfigError
from torchstone.lab.matching import counts_of, match, quantity, training_flops
from torchstone.recipe.load import load_recipe

V2 = ["model.block.mixer={kind: differential, version: v2}"]


def base(*overrides):
    return load_recipe(tiny_recipe(), ["model.width=64", *overrides])


def test_an_arm_that_agrees_is_left_alone():
    arm, record = match(base(), base("optimizer.learning_rate=0.1"), "params")
    assert arm == base("optimizer.learning_rate=0.1")
    assert (record.free, record.residual) == ("none needed", 0.0)


@pytest.mark.parametrize("on", ["params", "flops"])
def test_feedforward_width_is_solved_for(on):
    arm = base(*V2)
    assert abs(quantity(arm, on) / quantity(base(), on) - 1) > 0.05
    matched, record = match(base(), arm, on)
    assert record.free == "model.block.feedforward.hidden"
    assert abs(record.residual) <= 0.005
    assert record.achieved == quantity(matched, on)
    assert matched.model.block.feedforward.hidden == record.after < record.before == 64


def test_steps_can_be_traded_for_flops():
    arm = base(*V2, "budget.steps=1000")
    matched, record = match(base("budget.steps=1000"), arm, "flops", "steps")
    assert matched.budget.steps == record.after < 1000
    assert matched.model == arm.model
    assert training_flops(matched) == pytest.approx(training_flops(base("budget.steps=1000")), rel=0.005)


def test_depth_and_width():
    deep, record = match(base("model.depth=6"), base("model.block.feedforward.hidden=64"), "params", "depth", 0.02)
    assert deep.model.depth == record.after == 6
    wide, record = match(base("model.width=128"), base(), "params", "width")
    assert wide.model.width == record.after == 128


def test_an_impossible_match_is_refused_with_the_nearest_value():
    with pytest.raises(BudgetError, match=r"cannot match params by model\.depth: the nearest value \d+ gives"):
        match(base(), base(*V2), "params", "depth")


def test_what_cannot_be_matched_at_all_is_refused():
    with pytest.raises(BudgetError):
        match(base(), base("model.width=512"), "params", "feedforward")
    with pytest.raises(ConfigError, match="steps cannot change"):
        match(base(), base(*V2), "params", "steps")
    with pytest.raises(ConfigError, match="free one of"):
        match(base(), base(*V2), "params", "heads")


def test_counts_are_those_of_a_built_model():
    recipe = base(*V2)
    source = recipe.data.build(None)
    model = recipe.model.build(source.vocab_size, source.length, 0)
    assert counts_of(recipe).parameters == sum(p.numel() for p in model.parameters())
