"""The study of DAPE V2: arms that differ in what they say, matched controls, numbers of a trained cell, smoke."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.evals.extrapolation import held_out_windows
from torchstone.lab.matching import counts_of
from torchstone.lab.runner import RunOptions, run_study
from torchstone.recipe.load import load_recipe
from torchstone.studies.dape_v2 import DapeV2


def recipes(scale: str) -> dict:
    study = DapeV2()
    return {arm.name: load_recipe(arm.settings["recipe"]) for arm in study.check(study.scales[scale])}


def test_controls_cost_or_hold_what_v2_does() -> None:
    found = recipes("toy")
    v2, flops, parameters = (counts_of(found[name]) for name in ("kerple-v2", "kerple-flops", "kerple-params"))
    assert flops.training_flops_per_token == pytest.approx(v2.training_flops_per_token, rel=0.005)
    assert flops.parameters > 1.2 * v2.parameters  # the processor costs much and holds little
    assert parameters.parameters == pytest.approx(v2.parameters, rel=0.005)
    assert found["kerple-flops"].model.block.mixer.score_processor is None


def test_arms_are_what_their_names_say() -> None:
    found = recipes("toy")
    kinds = {name: recipe.model.block.mixer for name, recipe in found.items()}
    assert {name: mixer.position.kind for name, mixer in kinds.items() if "." not in name} == {
        "kerple": "kerple", "rope": "rotary", "nope": "none", "alibi": "alibi", "kerple-v1": "kerple", "kerple-v2": "kerple",
        "alibi-v1": "alibi", "alibi-v2": "alibi", "nope-v2": "none", "kerple-flops": "kerple", "kerple-params": "kerple",
    }  # fmt: skip
    versions = {name: mixer.score_processor.version for name, mixer in kinds.items() if mixer.score_processor}
    assert versions == {name: name[-2:] for name in kinds if name.endswith(("-v1", "-v2"))}
    assert found["recall.nope-v2"].model.depth == 1 and kinds["recall.nope-v2"].position.kind == "none"


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_the_held_out_text_has_the_windows_that_a_scale_asks_for(scale: str) -> None:
    settings, data = DapeV2.scales[scale].settings, recipes(scale)["kerple"].data
    longest = settings["length"] * settings["multiples"][-1]
    windows = held_out_windows(data, longest, settings["windows"])
    assert windows.tokens_nt.shape == (settings["windows"], longest + 1)
    windows.strangers()


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    result = run_study(DapeV2(), RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(cell.status == "done" for cell in result.cells), [cell.error for cell in result.cells]
    cells = {cell.arm: cell.metrics for cell in result.cells}
    assert {"loss_1x", "loss_8x", "slope", "foreign_gap"} <= set(cells["kerple-v2"])
    assert "loss_1x" not in cells["recall.nope"]
    table = next(table for table in result.tables if table.title == "Loss on the same last tokens")
    assert {row[0] for row in table.rows} == {name for name in cells if "." not in name}
    curve = next(figure for figure in result.figures if figure.title == "Length extrapolation")
    assert all(line.x == (16.0, 32.0, 64.0, 128.0) for line in curve.lines)
    assert any(figure.title.startswith("Bias that kerple-v2 learned") for figure in result.figures)
