"""What a branch gained is set against its cost at the last evaluation, and against the ancestor that went on as far."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_recipe

from torchstone.diagnose.run_tree import line_of, run_tree_finding
from torchstone.errors import InterruptedRun
from torchstone.recipe.load import load_recipe
from torchstone.train.branch import branch_run
from torchstone.train.loop import Callback, RunView
from torchstone.train.run import train
from torchstone.train.signals import Stop
from torchstone.train.tree import RunTree, TreeRun, read_tree

EVERY = {
    "schedule": {"kind": "constant"},
    "evaluation": {"every": 4, "sequences": 8},
    "checkpoint": {"every": 2, "keep": 9},
}


class StopAt(Callback):
    """Asks for a stop after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, Stop()

    def on_step(self, view: RunView) -> None:
        if view.position.step == self.step:
            self.stop.ask("the test")


def quietly(given: object, directory: Path, **options: object) -> None:
    train(given, directory, progress=lambda state: None, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RunTree:
    """A trunk of 12 steps, a branch 4 → 8, one on from its end to 12, and one stopped at 10, evaluated at 8."""
    folder = tmp_path_factory.mktemp("measured")
    quietly(load_recipe(tiny_recipe(**EVERY, budget={"steps": 12})), folder / "trunk")
    quietly(branch_run(f"{folder / 'trunk'}@4", folder / "decayed", decay=4), folder / "decayed")
    plan = ["budget.steps=12", "schedule=constant"]
    quietly(branch_run(folder / "decayed", folder / "again", overrides=plan), folder / "again")
    halt = StopAt(10)
    with pytest.raises(InterruptedRun):
        quietly(
            branch_run(f"{folder / 'trunk'}@4", folder / "stopped"),
            folder / "stopped",
            callbacks=[halt],
            stop=halt.stop,
        )
    return read_tree([folder])


def row(tree: RunTree, name: str) -> dict[str, object]:
    table = run_tree_finding(tree).tables[0]
    return next(dict(zip(table.columns, cells, strict=True)) for cells in table.rows if cells[0] == name)


def one(tree: RunTree, name: str) -> TreeRun:
    return next(run for run in tree.runs if run.name == name)


def test_costs_and_comparisons_are_those_of_the_last_evaluation(tree: RunTree) -> None:
    stopped, trunk = one(tree, "stopped"), one(tree, "trunk")
    assert stopped.end.steps == 10 and stopped.own.steps == 6
    assert stopped.evaluated and stopped.evaluated.steps == 8 and stopped.measured and stopped.measured.steps == 4
    assert stopped.gained is not None and stopped.gained_per_flop == stopped.gained / stopped.measured.flops
    found = row(tree, "stopped")
    assert (found["steps"], found["FLOPs"]) == (4, stopped.measured.flops)
    # a branch under the parent's own recipe is the parent: it is neither below nor above it
    assert found["below parent"] == 0 and stopped.loss_end == trunk.loss_at(stopped.evaluated.tokens)
    assert "stopped was last evaluated at step 8 of 10." in run_tree_finding(tree).notes
    assert " at step 8, stands at step 10 of 12" in line_of(stopped)


def test_a_continuation_is_compared_with_the_ancestor_that_went_on(tree: RunTree) -> None:
    again, trunk = one(tree, "again"), one(tree, "trunk")
    assert tree.parent(again) is one(tree, "decayed") and tree.compared(again) == (trunk, trunk.loss_end)
    assert row(tree, "again")["below parent"] == trunk.loss_end - again.loss_end  # type: ignore[operator]
