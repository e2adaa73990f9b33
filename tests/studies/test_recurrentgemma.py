"""The study of RecurrentGemma: equal arms that differ in their mixers, a tag beyond windows, numbers of a cell, smoke."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.evals.extrapolation import held_out_windows
from torchstone.lab.matching import counts_of
from torchstone.lab.runner import RunOptions, run_study
from torchstone.models.decoder import DecoderConfig
from torchstone.recipe.load import load_recipe
from torchstone.studies._recurrentgemma import ARMS, state_bytes
from torchstone.studies.recurrentgemma import RecurrentGemma

TASKS = ("", "far.", "recall.")


def recipes(scale: str) -> dict[str, Any]:
    study = RecurrentGemma()
    return {arm.name: load_recipe(arm.settings["recipe"]) for arm in study.check(study.scales[scale])}


@pytest.mark.parametrize("scale", list(RecurrentGemma.scales))
def test_arms_of_a_task_have_equal_parameters_and_differ_in_mixers(scale: str) -> None:
    found = recipes(scale)
    assert set(found) == {task + arm for task in TASKS for arm in ARMS}
    for task in TASKS:
        target = counts_of(found[f"{task}global"]).parameters
        kinds = {}
        for arm in ARMS:
            recipe = found[task + arm]
            assert counts_of(recipe).parameters == pytest.approx(target, rel=0.001)
            assert recipe.data == found[f"{task}global"].data and recipe.budget == found[f"{task}global"].budget
            kinds[arm] = [mixer.kind for mixer in recipe.model.pattern]
        assert kinds == {
            "global": ["attention"], "local": ["local-attention"], "hawk": ["rglru"],
            "griffin": ["rglru", "rglru", "local-attention"],
        }  # fmt: skip


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_questions_of_recall_lie_in_the_window_and_far_tags_beyond_it(scale: str) -> None:
    found, settings = recipes(scale), RecurrentGemma.scales[scale].settings
    (local,) = found["recall.local"].model.pattern
    source = found["recall.local"].data.build(None)
    tokens_bt = next(source.evaluation(32, 32)).tokens_bt
    gaps_bt = source.gaps(tokens_bt)
    assert 1 <= int(gaps_bt.max()) < local.window == settings["task_window"]
    assert float((gaps_bt > 0).double().mean()) > 0.1
    far = found["far.local"].data.build(None)
    reach = found["far.local"].model.depth * (settings["task_window"] - 1)
    assert int((far.distances() > reach).sum()) >= 3
    assert int((next(far.evaluation(1, 1)).targets_bt != IGNORE).sum()) >= 5


@pytest.mark.parametrize("scale", ["toy", "gpu"])
def test_the_held_out_text_has_the_windows_that_a_scale_asks_for(scale: str) -> None:
    settings, data = RecurrentGemma.scales[scale].settings, recipes(scale)["global"].data
    windows = held_out_windows(data, 8 * settings["length"], settings["windows"])
    assert windows.tokens_nt.shape == (settings["windows"], 8 * settings["length"] + 1)
    windows.strangers()


def test_only_global_attention_has_a_state_that_grows() -> None:
    found = recipes("toy")
    sizes = {}
    for arm in ARMS:
        config: DecoderConfig = found[arm].model
        sizes[arm] = state_bytes(config.skeleton(257, 128))
        real = config.build(257, 128, 0).new_state(1, 128, dtype=torch.float32)
        assert sizes[arm][0] == real.nbytes()
    assert sizes["global"][-1] > 60 * sizes["global"][0]
    assert all(sizes[arm][0] == sizes[arm][-1] for arm in ("local", "hawk", "griffin"))


def test_smoke_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    result = run_study(RecurrentGemma(), RunOptions(scale="smoke", seeds=1, out=tmp_path, on="inline")).result
    assert all(cell.status == "done" for cell in result.cells), [cell.error for cell in result.cells]
    cells = {cell.arm: cell.metrics for cell in result.cells}
    assert {"loss_1x", "loss_8x", "rise", "foreign_gap", "state_kib"} <= set(cells["griffin"])
    assert cells["griffin"]["rise"] == pytest.approx(cells["griffin"]["loss_8x"] - cells["griffin"]["loss_1x"])
    assert "beyond_accuracy" in cells["far.local"] and "beyond_accuracy" not in cells["recall.local"]
    summary = next(table for table in result.tables if table.title == "What each arm can do")
    assert [row[0] for row in summary.rows] == list(ARMS) and all(None not in row for row in summary.rows)
    titles = {figure.title for figure in result.figures}
    assert {"Loss by context", "Decoding state", "Decay spectrum of hawk", "Decay spectrum of griffin"} <= titles
