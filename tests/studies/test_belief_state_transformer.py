"""The belief-state study: arms that spend what they should, graphs that fit, numbers of a trained cell, smoke."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.lab.matching import training_flops
from torchstone.lab.runner import RunOptions, run_study
from torchstone.objectives.belief_pairs import pairs_of
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.studies.belief_state_transformer import BeliefStateTransformer

every_scale = pytest.mark.parametrize("scale", ["toy", "gpu"])


def recipes(scale: str) -> dict[str, Recipe]:
    study = BeliefStateTransformer()
    return {arm.name: load_recipe(arm.settings["recipe"]) for arm in study.check(study.scales[scale])}


@every_scale
def test_arms_spend_equal_flops(scale: str) -> None:
    found = recipes(scale)
    spent = {name: training_flops(recipe) for name, recipe in found.items()}
    assert spent["next-token"] == pytest.approx(spent["belief-state"], rel=0.005)
    assert spent["no-prev"] == pytest.approx(spent["belief-state"], rel=0.005)
    assert spent["empty-suffix"] > spent["belief-state"]
    assert found["empty-suffix"].budget.steps == found["belief-state"].budget.steps
    assert spent["infill.plain"] == pytest.approx(spent["infill.fim"], rel=0.005)


@every_scale
def test_infilling_arms_are_matched_with_the_pairs_of_real_rows(scale: str) -> None:
    found = recipes(scale)
    recipe, length = found["infill.belief-state"], found["infill.belief-state"].data.sequence_length()
    model, rule = recipe.model.skeleton(recipe.data.vocabulary(), length), recipe.objective.build().rule
    batches = [recipe.data.build(None).batch(3, step, 32).tokens_bt for step in range(4)]
    pairs = sum(len(pairs_of(tokens_bt, model.end_token, rule)) for tokens_bt in batches) / 128
    unseen = 3 * (pairs - rule.per_row(length) * rule.rate) * model.head.pair_flops()
    real = training_flops(recipe) + unseen * recipe.batch.sequences * recipe.budget.steps
    assert real == pytest.approx(training_flops(found["infill.fim"]), rel=0.02)


@every_scale
def test_arms_are_what_their_names_say(scale: str) -> None:
    found = recipes(scale)
    kinds = {name: (recipe.model.kind, recipe.objective.kind) for name, recipe in found.items()}
    pairs = ("belief-state", "belief-state")
    assert kinds == {
        "next-token": ("decoder", "next-token"), "belief-state": pairs, "no-prev": pairs,
        "empty-suffix": ("belief-state", "next-token"), "infill.fim": ("decoder", "fill-in-the-middle"),
        "infill.plain": ("decoder", "next-token"), "infill.belief-state": pairs,
    }  # fmt: skip
    task = found["belief-state"].data
    assert found["belief-state"].objective.context_length == task.equals_index()
    assert found["belief-state"].objective.gap_min == 2 and found["belief-state"].model.end_token == task.end_token()
    assert found["no-prev"].objective.prev_weight == 0 and found["belief-state"].objective.prev_weight == 1
    planning = [recipe for name, recipe in found.items() if not name.startswith("infill")]
    same = [(one.model.depth, one.model.width, one.model.block, one.data, one.optimizer, one.batch) for one in planning]
    assert all(one == same[0] for one in same)
    assert {found[f"infill.{name}"].data.order for name in ("plain", "belief-state")} == {"as-written"}


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    study = BeliefStateTransformer()
    result = run_study(study, RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(cell.status == "done" for cell in result.cells), [cell.error for cell in result.cells]
    cells = {cell.arm: cell for cell in result.cells}
    measured = {name: set(cell.metrics) & {metric.name for metric in study.metrics} for name, cell in cells.items()}
    for arm in ("next-token", "belief-state", "no-prev", "empty-suffix"):
        assert {"path_accuracy", "first_step"} <= measured[arm]
        assert len(cells[arm].series["path accuracy"].values) >= 2
    assert measured["infill.fim"] == {"infill_loss"} and measured["infill.plain"] == {"plain_loss"}
    assert measured["infill.belief-state"] == {"infill_loss", "plain_loss"}
    recipe = load_recipe(
        next(arm for arm in study.check(study.scales["smoke"]) if arm.name == "belief-state").settings["recipe"]
    )
    assert cells["belief-state"].flops == pytest.approx(training_flops(recipe))
    planning, costs = result.tables[:2]
    assert {row[0] for row in planning.rows} == {"next-token", "belief-state", "no-prev", "empty-suffix"}
    assert {row[0] for row in costs.rows} == set(cells)
    curve = next(figure for figure in result.figures if figure.title == "Whole paths right")
    assert curve.lines[-1].name == "guessing the arm" and set(curve.lines[-1].y) == {0.5}
