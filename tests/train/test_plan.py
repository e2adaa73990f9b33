"""The plan of a recipe adds up, for every kind of schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Schedule
from torchstone.recipe.load import load_recipe
from torchstone.recipe.registry import kinds
from torchstone.train.budget import counts_of, tokens_per_step
from torchstone.train.plan import plan_of

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"
SYNTHETIC = ["data={kind: bigram}", "budget.steps=100", "optimizer.learning_rate=2e-3"]


def planned(*overrides: str):
    return plan_of(load_recipe(TINY, [*SYNTHETIC, *overrides]))


@pytest.mark.parametrize("kind", kinds("schedule"))
def test_phases_are_the_whole_run_and_cost_what_the_recipe_costs(kind):
    recipe = load_recipe(TINY, [*SYNTHETIC, f"schedule={kind}"])
    plan = plan_of(recipe)
    assert (plan.kind, plan.steps, plan.tokens) == (kind, 100, 100 * tokens_per_step(recipe))
    assert plan.flops == counts_of(recipe).training_flops_per_token * plan.tokens
    assert [step for phase in plan.phases for step in range(phase.begin, phase.end)] == list(range(100))
    assert sum(phase.tokens for phase in plan.phases) == plan.tokens
    assert sum(phase.flops for phase in plan.phases) == pytest.approx(plan.flops)
    assert sum(phase.share for phase in plan.phases) == pytest.approx(1)
    schedule = recipe.schedule.build(100)
    for phase in plan.phases:
        assert (phase.first, phase.last) == (schedule.factor(phase.begin), schedule.factor(phase.end - 1))
    assert plan.schedule.peak == 2e-3
    assert plan.served[-1].step == 100 and plan.served[-1].tokens == plan.tokens
    for budget in plan.served:
        assert budget.warmup + budget.stable + budget.decay == budget.step


def test_what_is_behind_a_checkpoint():
    plan = planned("schedule={kind: wsd-s, cycles: [20, 50], warmup: 4, decay: 0.2}")
    behind = [(item.step, item.warmup, item.stable, item.decay, item.earlier_decays) for item in plan.served]
    assert behind == [(20, 4, 12, 4, 0), (50, 4, 36, 10, 4), (100, 4, 76, 20, 10)]


def test_phases_carry_the_shares_of_the_data():
    plan = planned(
        "data={kind: mixture, shares: [0.75, 0.25], sources: [{kind: bigram}, {kind: bigram}]}",
        "data_phases={decay: [0.25, 0.75]}",
        "schedule={kind: wsd, warmup: 10, decay: 20}",
    )
    assert [(phase.stage, phase.sources) for phase in plan.phases] == [
        ("warmup", (0.75, 0.25)),
        ("stable", (0.75, 0.25)),
        ("decay", (0.25, 0.75)),
    ]


def test_it_is_written_as_json_and_a_picture(tmp_path):
    plan = planned("schedule={kind: wsd-s, cycles: 2}")
    paths = plan.write(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["plan.json", "plan.svg"]
    stored = json.loads(paths[0].read_text())
    assert stored == json.loads(json.dumps(plan.as_json()))
    assert Schedule.from_state_dict(stored["schedule"]) == plan.schedule
    assert paths[1].read_text().startswith("<svg")


def test_a_schedule_that_does_not_fit_the_run_is_refused():
    with pytest.raises(ConfigError, match="cycle 0: warmup 30 \\+ decay 80 exceeds 100 steps"):
        planned("schedule={kind: wsd-s, warmup: 30, decay: 80}")
