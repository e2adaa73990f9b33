"""The tree of runs: links, costs counted once, gains, missing parents, damage, copies, circles; and its finding."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from torchstone.diagnose.run_tree import run_tree_finding
from torchstone.errors import ConfigError, InterruptedRun
from torchstone.report.finding_write import write
from torchstone.storage.journal import Journal
from torchstone.train.branch import branch_run
from torchstone.train.growth import AppendUnits, grow_run
from torchstone.train.run import train
from torchstone.train.signals import Stop
from torchstone.train.tree import RunTree, read_tree

PLAIN: dict[str, Any] = {
    "schedule": {"kind": "constant", "warmup": 0},
    "budget": {"steps": 12},
    "evaluation": {"every": 4, "sequences": 8},
    "checkpoint": {"every": 2, "keep": 9},
}


def run(given: Any, directory: Path) -> Any:
    return train(given, directory, progress=lambda state: None)


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk with a decay at 4, one at 8 that goes on from its end, a grown run at 12, and a run of its own."""
    folder = tmp_path_factory.mktemp("tree")
    model = {**tiny_recipe()["model"], "block": {"mixer": "attention", "feedforward": {"kind": "mlp", "hidden": 32}}}
    run(tiny_recipe(**PLAIN, model=model), folder / "trunk")
    run(branch_run(f"{folder / 'trunk'}@4", folder / "early", decay=3), folder / "early")
    run(branch_run(f"{folder / 'trunk'}@8", folder / "late", decay=4), folder / "late")
    plan = ["budget.steps=16", "schedule=constant", "schedule.warmup=0"]
    run(branch_run(folder / "late", folder / "again", overrides=plan), folder / "again")
    grow_run(folder / "trunk", folder / "grown", AppendUnits(2), until=14)
    run(folder / "grown" / "recipe.yaml", folder / "grown")
    run(tiny_recipe(**{**PLAIN, "seed": 3}), folder / "other" / "alone")
    return folder


def named(tree: RunTree) -> dict[str, Any]:
    return {one.name: one for one in tree.runs}


def test_runs_are_linked_and_come_parents_first(forest: Path) -> None:
    tree = read_tree([forest])
    assert tree.problems == ()
    places = [(one.name, one.depth, one.kind) for one in tree.runs]
    assert places == [
        ("other/alone", 0, "run"),
        ("trunk", 0, "run"),
        ("early", 1, "branch"),
        ("late", 1, "branch"),
        ("again", 2, "branch"),
        ("grown", 1, "growth"),
    ]
    runs = named(tree)
    assert tree.parent(runs["again"]) is runs["late"] and tree.children(runs["trunk"]) == [
        runs["early"], runs["late"], runs["grown"],
    ]  # fmt: skip


def test_costs_of_each_of_the_path_and_of_the_tree(forest: Path) -> None:
    tree = read_tree([forest / name for name in ("trunk", "early", "late", "again", "grown")])
    runs = named(tree)
    own = {name: one.own.steps for name, one in runs.items()}
    assert own == {"trunk": 12, "early": 3, "late": 4, "again": 4, "grown": 2}
    per_step, flops = runs["trunk"].end.tokens // 12, runs["trunk"].end.flops / 12
    assert tree.total.steps == 25 and tree.total.tokens == 25 * per_step
    assert [runs[name].end.steps for name in ("early", "late", "again", "grown")] == [7, 12, 16, 14]
    assert runs["again"].end.flops == pytest.approx(16 * flops)
    assert runs["grown"].own.flops > 2 * flops  # each token at the price of the model that saw it
    assert tree.total.flops == pytest.approx(23 * flops + runs["grown"].own.flops)
    assert tree.separate.flops == pytest.approx((12 + 7 + 12 + 16 + 12) * flops + runs["grown"].own.flops)
    for one in runs.values():
        assert 0 < one.own.seconds <= one.end.seconds
        assert one.own.seconds == pytest.approx(one.end.seconds - one.begin.seconds)


def test_gains_are_those_of_the_curves(forest: Path) -> None:
    runs = named(read_tree([forest]))
    trunk = runs["trunk"].history["validation"]
    assert runs["trunk"].gained is None
    for name, place in (("early", 0), ("late", 1)):
        one = runs[name]
        assert one.loss_begin == trunk["loss"][place] and not one.approximate
        assert one.gained == trunk["loss"][place] - one.history["validation"]["loss"][-1]
        assert one.measured == one.own and one.gained_per_flop == one.gained / one.own.flops
    assert runs["again"].loss_begin == runs["late"].loss_end
    assert runs["grown"].loss_begin == trunk["loss"][2] and not runs["grown"].approximate
    tokens, losses = trunk["tokens"], trunk["loss"]
    assert runs["trunk"].loss_at(tokens[1]) == losses[1]
    assert runs["trunk"].loss_at((tokens[0] + tokens[1]) / 2) == pytest.approx((losses[0] + losses[1]) / 2)
    assert runs["trunk"].loss_at(tokens[-1] + 1) is None and runs["trunk"].loss_at(0) is None


def test_parents_elsewhere_are_found_by_the_records(forest: Path, tmp_path: Path) -> None:
    assert [one.name for one in read_tree([forest / "again"]).runs] == ["trunk", "late", "again"]
    shutil.copytree(forest / "again", tmp_path / "again")  # moved away: the way back is lost
    tree = read_tree([tmp_path])
    (lone,) = tree.runs
    assert lone.depth == 0 and lone.begin.steps == 12 and lone.own.steps == 4
    assert tree.total.steps == 16  # the trunk that is not there still cost its steps
    assert len(tree.problems) == 1 and "was not found: its steps up to 12 count as one trunk" in tree.problems[0]
    both = read_tree([tmp_path, forest / "trunk"])
    assert len(both.runs) == 2 and both.total.steps == 28


def test_a_trunk_that_is_missing_counts_once(forest: Path, tmp_path: Path) -> None:
    for name in ("early", "late"):
        shutil.copytree(forest / name, tmp_path / name)
    assert read_tree([tmp_path]).total.steps == 8 + 3 + 4


def test_damage_copies_and_circles_are_named_and_the_rest_is_read(forest: Path, tmp_path: Path) -> None:
    shutil.copytree(forest, tmp_path / "runs")
    (tmp_path / "runs" / "other" / "alone" / "run.json").write_text("{")
    shutil.copytree(tmp_path / "runs" / "early", tmp_path / "runs" / "early-2")
    (tmp_path / "runs" / "grown" / "recipe.yaml").unlink()
    tree = read_tree([tmp_path / "runs"])
    assert [one.name for one in tree.runs] == ["trunk", "early", "late", "again"]
    assert len(tree.problems) == 3
    for words in (
        r"early-2 has the id of .*early, of which it is a copy",
        r"run\.json is damaged",
        "there is no recipe",
    ):
        assert any(re.search(words, line) for line in tree.problems), words


def test_a_circle_is_cut(forest: Path, tmp_path: Path) -> None:
    for name in ("late", "again"):
        shutil.copytree(forest / name, tmp_path / name)
    child, parent = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("again", "late"))
    parent["origin"] = {**parent["origin"], "run": child["id"], "directory": "../again"}
    (tmp_path / "late" / "run.json").write_text(json.dumps(parent))
    tree = read_tree([tmp_path])
    assert [one.depth for one in tree.runs] == [0, 1]
    assert len(tree.problems) >= 1 and "name each other as parents" in tree.problems[0]
    itself = {**child, "origin": {**child["origin"], "run": child["id"]}}
    (tmp_path / "again" / "run.json").write_text(json.dumps(itself))
    assert "name each other as parents" in " ".join(read_tree([tmp_path / "again"]).problems)


@pytest.mark.parametrize(
    "origin",
    [
        {"kind": "branch"},
        {
            "kind": "stolen",
            "run": "a",
            "directory": "",
            "step": 1,
            "tokens": 1,
            "flops": 1.0,
            "changes": [],
            "taints": [],
        },
        {
            "kind": "branch",
            "run": "a",
            "directory": "",
            "step": "1",
            "tokens": 1,
            "flops": 1.0,
            "changes": [],
            "taints": [],
        },
        [1],
    ],
)
def test_an_origin_that_is_none_is_damage(forest: Path, tmp_path: Path, origin: Any) -> None:
    shutil.copytree(forest / "early", tmp_path / "early")
    shutil.copytree(forest / "trunk", tmp_path / "trunk")
    stored = json.loads((tmp_path / "early" / "run.json").read_text())
    (tmp_path / "early" / "run.json").write_text(json.dumps({**stored, "origin": origin}))
    tree = read_tree([tmp_path])
    assert [one.name for one in tree.runs] == ["trunk"] and "run.json is damaged" in tree.problems[0]


def test_an_interrupted_branch_stands_where_it_is(forest: Path, tmp_path: Path) -> None:
    shutil.copytree(forest / "trunk", tmp_path / "trunk")
    asked = branch_run(f"{tmp_path / 'trunk'}@6", tmp_path / "branch", decay=4)
    fresh = named(read_tree([tmp_path]))["branch"]
    assert fresh.own.steps == 0 and fresh.gained is None and fresh.gained_per_flop is None
    stop = Stop()
    with pytest.raises(InterruptedRun):
        train(asked, tmp_path / "branch", stop=stop, progress=lambda s: stop.ask("test") if s["step"] == 7 else None)
    tree = read_tree([tmp_path])
    assert named(tree)["branch"].own.steps == 1 and named(tree)["branch"].planned == 10
    assert "branch stands at step 7 of 10." in run_tree_finding(tree).notes


def test_a_run_that_is_being_extended_counts_the_steps_after_its_old_end(forest: Path, tmp_path: Path) -> None:
    shutil.copytree(forest / "other" / "alone", tmp_path / "alone")
    longer = tiny_recipe(**{**PLAIN, "seed": 3, "budget": {"steps": 20}})
    stop = Stop()
    with pytest.raises(InterruptedRun):
        train(longer, tmp_path / "alone", stop=stop, progress=lambda s: stop.ask("test") if s["step"] == 14 else None)
    (one,) = read_tree([tmp_path]).runs
    assert (one.end.steps, one.planned) == (14, 20)


@pytest.mark.parametrize("change", [{"tokens": "many"}, {"flops": None}, {"loss": [1]}])
def test_metrics_without_numbers_are_named(forest: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(forest / "trunk", tmp_path / "trunk")
    journal = Journal(tmp_path / "trunk" / "metrics.jsonl")
    journal.append({**journal.read().records[0], "kind": "train", "step": 12, **change})
    tree = read_tree([tmp_path])
    assert tree.runs == () and f"without a number for {next(iter(change))}" in tree.problems[0]
    assert run_tree_finding(tree).tables[0].rows == ()


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run there"):
        read_tree([tmp_path])
    with pytest.raises(ConfigError, match="is no folder"):
        read_tree([tmp_path / "absent"])


def test_the_finding_holds_costs_gains_and_curves_from_the_branching_point(forest: Path, tmp_path: Path) -> None:
    tree = read_tree([forest])
    finding = run_tree_finding(tree)
    gains, costs = finding.tables
    rows = {row[0]: dict(zip(gains.columns, row, strict=True)) for row in gains.rows}
    early = named(tree)["early"]
    assert rows["early"]["from"] == "trunk@4" and rows["early"]["gained"] == early.gained
    same = named(tree)["trunk"].loss_at(early.end.tokens)
    assert rows["early"]["below parent"] == same - early.loss_end
    assert rows["again"]["below parent"] is None  # parent and trunk ended where this one begins
    assert costs.rows[-1][0] == "the whole tree" and costs.rows[-1][2] == tree.total.steps
    losses, rates = finding.figures
    assert {line.name for line in losses.lines} == {line.name for line in rates.lines} == set(named(tree))
    line = next(line for line in losses.lines if line.name == "early")
    assert (line.x[0], line.y[0]) == (early.begin.tokens, early.loss_begin) and line.y[-1] == early.loss_end
    page = write(finding, tmp_path / "report").read_text()
    assert "What each run cost and gained" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "times as much" in finding.answer


def test_a_single_run_has_a_finding_too(forest: Path) -> None:
    finding = run_tree_finding(read_tree([forest / "other"]))
    assert "No branch has an evaluation of its own yet" in finding.answer
    assert len(finding.tables[0].rows) == 1
