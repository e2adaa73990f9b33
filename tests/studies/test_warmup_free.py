"""The study of warmup: arms that differ in the optimizer alone, honest sweeps, its numbers, smoke."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchstone.errors import StudyError
from torchstone.lab.matching import counts_of
from torchstone.lab.runner import RunOptions, run_study
from torchstone.lab.study import Arm, Cell, Measurement
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.studies import _warmup_free as runs
from torchstone.studies.warmup_free import WarmupFree

MAIN = ["adamw", "liona", "lionar", "lionar-plus"]
CONTROLS = ["lionar-plus-none", "lionar-no-momentum", "lionar-frozen"]


def recipes(scale: str) -> dict[str, Recipe]:
    study = WarmupFree()
    return {arm.name: load_recipe(arm.settings["recipe"]) for arm in study.check(study.scales[scale])}


def cell(arm: str, scale: str = "toy") -> Any:
    return SimpleNamespace(arm=SimpleNamespace(name=arm), settings=WarmupFree.scales[scale].settings, seed=3)


@pytest.mark.parametrize("scale", ["smoke", "toy", "gpu"])
def test_arms_differ_in_their_optimizer_alone(scale: str) -> None:
    found = recipes(scale)
    assert list(found) == MAIN + (CONTROLS if scale != "gpu" else CONTROLS[:1])
    for name in MAIN:
        same = found[name].model_copy(update={"optimizer": found["adamw"].optimizer})
        assert same == found["adamw"] and counts_of(found[name]).parameters == counts_of(found["adamw"]).parameters
        assert (
            found[name].optimizer.clip is None
            and found[name].optimizer.weight_decay == found["adamw"].optimizer.weight_decay
        )
    plus, plain = found["lionar-plus"].optimizer, found["lionar"].optimizer
    assert (plus.beta, plus.nesterov, plus.bias_correction) == (0.98, True, "inverse")
    assert (plain.beta, plain.nesterov, plain.bias_correction) == (0.9, False, "none")
    assert plain.angle_schedule == plus.angle_schedule == "linear" and found["liona"].optimizer.beta == 0.9


def test_controls_change_what_they_say() -> None:
    found = recipes("toy")
    plus, none = found["lionar-plus"].optimizer, found["lionar-plus-none"].optimizer
    assert none == plus.model_copy(update={"bias_correction": "none"})
    assert found["lionar-no-momentum"].optimizer.beta == 0
    frozen = found["lionar-frozen"]
    assert frozen.optimizer.rotate_embeddings and frozen.model.block.projection.kind == "linear"
    assert not found["lionar"].optimizer.rotate_embeddings and found["lionar"].model.block.projection.kind == "gained"


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_late_updates_are_at_the_peak_rate(scale: str) -> None:
    for recipe in recipes(scale).values():
        none = runs.recipe_of(recipe, "none", 2.0)
        schedule = none.schedule.build(none.budget.steps)
        assert {schedule.factor(step) for step in range(int(0.8 * none.budget.steps))} == {1.0}
        assert none.optimizer.learning_rate == 2 * recipe.optimizer.learning_rate
        warm = runs.recipe_of(recipe, "warm", 1.0)
        assert warm.schedule.build(warm.budget.steps).factor(0) < 0.2
        longer = runs.recipe_of(recipe, "long", 1.0)
        assert longer.schedule.warmup == pytest.approx(4 * recipe.schedule.warmup)


def test_every_arm_of_a_claim_has_a_sweep_with_an_inside() -> None:
    for arm in MAIN:
        sweep = runs.sweep(cell(arm))
        kinds = [kind for kind, _ in sweep]
        assert kinds.count("none") == kinds.count("warm") == 4
        assert kinds.count("long") == (4 if arm in ("adamw", "lionar-plus") else 0) and len(set(sweep)) == len(sweep)
        assert [factor for _, factor in sweep[:2]] == [1.0, 1.0] and {kind for kind, _ in sweep[:2]} == {"none", "warm"}
        factors = sorted({factor for _, factor in sweep})
        assert all(high / low == 2 for low, high in zip(factors, factors[1:], strict=False))
    assert len(runs.sweep(cell("lionar-plus-none"))) == 4 and len(runs.sweep(cell("lionar-frozen"))) == 2
    assert len(runs.sweep(cell("liona", "gpu"))) == 2 and len(runs.sweep(cell("adamw", "gpu"))) == 6


def test_gap_claims_wait_for_peaks_inside_the_sweep() -> None:
    gates = {claim.id: claim.gate for claim in WarmupFree.claims if claim.metric == "warmup_gap"}
    assert len(gates) == 4 and all(gate is not None and gate.metric == "peak_inside" for gate in gates.values())
    assert gates["gap"].arm == "adamw" and gates["liona-gains"].arm == "liona"


def test_the_gap_takes_the_better_warmup_and_leaves_out_runs_that_diverged() -> None:
    losses = {"none": {"1": 2.0, "2": None, "4": 1.9}, "warm": {"1": 1.8, "2": 1.85}, "long": {"1": 1.7, "2": 1.75}}
    found = runs.gap(losses, cell("adamw"))
    assert found == pytest.approx({"loss_none": 1.9, "loss_warm": 1.7, "warmup_gap": 0.2})
    with pytest.raises(StudyError, match=r"every run of adamw \(none\) diverged at seed 3"):
        runs.gap({"none": {"1": None}, "warm": {"1": 1.0}}, cell("adamw"))


def test_a_best_peak_is_inside_only_with_neighbours_on_both_sides() -> None:
    inner = {"0.5": 2.0, "1": 1.9, "2": 2.1}
    assert runs.inside_sweep({"none": inner, "warm": inner})
    assert runs.inside_sweep({"none": inner, "warm": {"0.5": 2.0, "1": 1.9, "2": None}})
    assert not runs.inside_sweep({"none": {"0.5": 1.8, "1": 1.9, "2": 2.1}, "warm": inner})
    assert not runs.inside_sweep({"none": inner, "warm": inner, "long": {"0.5": 2.0, "1": 1.9, "2": 1.8}})
    assert runs.inside_sweep({"none": inner, "warm": {"0.5": 2.0, "1": 2.0, "2": 1.95}, "long": inner})
    assert not runs.inside_sweep({"none": inner, "warm": {"1": None}})


def records(early: float, late: float, bent: float = 1.0) -> list[dict[str, Any]]:
    """Records of 40 steps of two matrices in blocks and one outside; one bends its angle at steps 3 to 5."""

    def numbers(step: int) -> dict[str, float]:
        size = early if step <= 5 else late
        return {"l2": size, "angle": size * (bent if 2 < step <= 5 else 1.0), "rrc": size}

    return [
        {
            "step": step,
            "rate": 1.0,
            "l2": 99.0,
            "matrices": {
                "blocks.0.a": numbers(step),
                "blocks.1.b": numbers(step) | {"angle": late},
                "embed": {"l2": 50.0, "angle": 50.0},
            },
        }
        for step in range(1, 41)
    ]


def test_ratios_are_of_the_matrices_inside_blocks() -> None:
    inside = [runs.inside(record) for record in records(3.0, 1.0)]
    assert inside[0]["l2"] == pytest.approx(3 * 2**0.5) and set(inside[0]["matrices"]) == {"blocks.0.a", "blocks.1.b"}
    found = runs.ratios(inside)
    assert found == pytest.approx(
        {"l2_ratio": 3, "angle_ratio": 2, "rrc_ratio": 3, "l2_deviation": 2, "angle_deviation": 1, "angle_worst": 2}
    )
    assert runs.ratios([]) == {}


def test_deviations_are_distances_from_one() -> None:
    found = runs.ratios([runs.inside(record) for record in records(1.0, 1.0, bent=1.2)])
    assert found["angle_deviation"] == pytest.approx(0.1) and found["angle_ratio"] == pytest.approx(1.1)
    assert found["l2_deviation"] == 0 and found["angle_worst"] == pytest.approx(0.2)


def test_the_table_shows_both_lengths_of_warmup() -> None:
    losses = {"none": {"0.5": 2.0, "1": 1.9}, "warm": {"0.5": 2.0, "1": 1.85}, "long": {"0.5": 1.8, "1": None}}
    metrics = {"warmup_gap": 0.1, "peak_inside": 0.0}
    made = Cell(Arm("adamw"), 0, "toy", {}, Path("."))
    table = runs.gap_table([(made, Measurement(metrics, extra={"losses": losses, "curves": {}, "centre": 1.0}))])
    assert table.rows == (("adamw", 1.9, 1.85, 1.8, 0.1, 1, "1 of 1"),)


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    result = run_study(WarmupFree(), RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(one.status == "done" for one in result.cells), [one.error for one in result.cells]
    metrics = {one.arm: one.metrics for one in result.cells}
    assert metrics["adamw"]["angle_ratio"] > 1.2
    assert metrics["liona"]["l2_deviation"] < 0.1
    assert 0 < metrics["lionar"]["angle_deviation"] < 0.01
    for arm in (*MAIN, "lionar-frozen"):
        found = metrics[arm]
        assert found["warmup_gap"] == pytest.approx(found["loss_none"] - found["loss_warm"])
        assert found["signal_drop"] == pytest.approx(found["signal_early"] - found["signal_late"])
        assert found["peak_inside"] == 0  # two peaks have no inside
    gaps, ratios, signal = result.tables[:3]
    assert [row[0] for row in signal.rows] == MAIN + CONTROLS
    assert [row[0] for row in gaps.rows] == MAIN + CONTROLS
    assert {row[1] for row in ratios.rows} == {"none", "warm"}
    titles = {figure.title for figure in result.figures}
    assert {"Angle of updates (rad) by step", "L2 norm of updates by step", "Relative representation change by step",
            "Validation loss by peak rate"} == titles  # fmt: skip
    lines = next(figure for figure in result.figures if figure.title.startswith("Angle")).lines
    assert {"adamw, none", "adamw, warm", "lionar, none"} <= {line.name for line in lines}
