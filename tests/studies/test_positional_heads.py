"""The study end to end at smoke scale, its statistics, and the design that its docstring promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from torchstone.lab.progress import Quiet
from torchstone.lab.runnable import Runnable
from torchstone.lab.study import Cell
from torchstone.recipe.load import load_recipe
from torchstone.storage.lease import Lease
from torchstone.studies import _positional_heads as bench
from torchstone.studies import _positional_heads_report as report
from torchstone.studies._positional_heads import top
from torchstone.studies.positional_heads import PositionalHeads


def test_arms_differ_by_the_rule_alone() -> None:
    study = PositionalHeads()
    for scale in study.scales.values():
        arms = study.check(scale)
        assert len({json.dumps(arm.settings["recipe"], sort_keys=True) for arm in arms}) == 1
        assert all(not study.arm_record(arm).intervention for arm in arms)
        recipe = load_recipe(arms[0].settings["recipe"])
        assert recipe.data.sequence_length() == scale.settings["length"] and recipe.data.shares == [0.5, 0.5]
        assert scale.settings["seeds"] == scale.seeds and scale.settings["draws"] >= 20
        assert scale.settings["scored"] <= scale.settings["evaluate"]
    assert {arm.name for arm in arms if arm.role == "baseline"} == {"random-95"}
    assert study.scales["toy"].seeds >= 3


def test_smoke_trains_one_model_per_seed(tmp_path) -> None:
    finished = Runnable(PositionalHeads()).run("smoke", seeds=1, out=tmp_path, on="inline", progress=Quiet())
    assert [cell.error for cell in finished.result.cells if cell.status != "done"] == []
    assert {verdict.status for verdict in finished.verdicts} == {"inconclusive"}
    made = {path.parent.name for path in (tmp_path / "models").glob("*/record.json")}
    assert made == {"seed-0"}
    assert len({cell.metrics["recall_accuracy"] for cell in finished.result.cells}) == 1
    titles = {table.title for table in finished.result.tables}
    assert titles == {"The rule written beforehand", "Three explanations", "Heads"}
    heads = next(table for table in finished.result.tables if table.title == "Heads")
    assert len(heads.rows) == 8 and len(finished.result.figures[0].lines) == 4


def test_a_waiting_process_makes_the_next_seeds_record(tmp_path, monkeypatch) -> None:
    study = PositionalHeads()
    scale = study.scales["smoke"]
    made: list[int] = []
    models = tmp_path / "models"

    def make(cell: Cell, directory: Path, seed: int) -> dict:
        made.append(seed)
        lease.release()  # the other process is done with seed 0
        (models / "seed-0" / "record.json").write_text('{"seed": 0}')
        return {"seed": seed}

    (models / "seed-0").mkdir(parents=True)
    lease = Lease(models / "seed-0" / "record.lease")
    assert lease.acquire()
    monkeypatch.setattr(bench, "_make", make)
    cell = Cell(study.arms(scale)[0], 0, "smoke", scale.settings, tmp_path / "cells" / "random" / "seed-0")
    assert bench.record_of(cell) == {"seed": 0} and made == [1]
    assert bench.record_of(replace(cell, seed=1)) == {"seed": 1} and made == [1]
    elsewhere = replace(cell, directory=tmp_path / "scratch" / "cell", settings={**scale.settings, "seeds": 1})
    assert bench.record_of(elsewhere)["seed"] == 0 and (elsewhere.directory / "seed-0" / "record.json").exists()


def record(seed: int, drop: float = 0.5) -> dict:
    generator = np.random.default_rng(seed)
    shift = generator.normal(size=8)
    draws = {"distant": [0.1] * 15 + [0.2] * 6, "recall": [0.1] * 21, "text": [0.0] * 21, "gap 1": [0.0] * 21}
    one = {"distant": drop, "recall": drop, "text": 0.1, "gap 1": drop}
    rises = {"shift": one, "lowest": one, "mean_distance": one, "retrieval": one, "random": draws}
    columns = {name: generator.normal(size=8).tolist() for name in ("z", "far", "mean_distance", "retrieval")}
    return {
        "heads": [[0, head] for head in range(8)],
        "columns": {"shift": shift.tolist(), **columns},
        "single": (shift**3).tolist(),
        "single_text": generator.normal(size=8).tolist(),
        "untrained": [0.0] * 8,
        "plain": {"recall": 0.01, "distant": 0.02, "text": 1.5, "gap 1": 0.0},
        "rises": {"mean": rises, "window": rises},
    }


def test_metrics_of_rules_and_of_chance() -> None:
    found = report.metrics_of(record(0), "shift")
    assert found["spearman"] == pytest.approx(1.0) and found["distant_drop"] == 0.5
    assert found["recall_accuracy"] == pytest.approx(0.99)
    chance = report.metrics_of(record(0), "random")
    assert abs(chance["spearman"]) < 0.1 and chance["distant_drop"] == pytest.approx(27 / 210)
    assert 0.4 < report.metrics_of(record(0), "random", 0.95)["spearman"] < 0.9
    assert "spearman" not in report.metrics_of(record(0), "lowest")
    assert "partial_distance" not in report.metrics_of(record(0), "mean_distance")


@pytest.mark.parametrize(("drop", "word"), [(0.5, "holds"), (0.15, "fails"), (0.05, "inconclusive")])
def test_the_designs_rule(drop: float, word: str) -> None:
    table = report.rule_table({seed: record(seed, drop) for seed in range(3)})
    assert f"The rule says {word}:" in table.note and len(table.rows) == 4


def test_rank_correlations() -> None:
    generator = np.random.default_rng(0)
    x, y, z = generator.normal(size=(3, 40))
    x, y = x + 2 * z, y + 2 * z
    expected = stats.spearmanr(x, y)
    assert report.spearman(x, y) == pytest.approx(expected.statistic)
    assert report.p_value(expected.statistic, 40) == pytest.approx(expected.pvalue)
    assert report.spearman(x, y) > 0.6 and abs(report.spearman(x, y, z)) < 0.35
    assert report.spearman(np.ones(40), y) == 0.0 and report.p_value(0.5, 3, 2) == 1.0


def test_top_takes_the_highest() -> None:
    assert top([(0, 0), (0, 1), (1, 0)], [0.1, 0.5, 0.3], 2) == [(0, 1), (1, 0)]
