"""Checkpoints of decayed states stay when a run goes on under another plan, and the old end of a run that is extended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_recipe

from torchstone.errors import CheckpointError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.record import read_record
from torchstone.train.run import train

CYCLES = {"kind": "wsd-s", "cycles": [3, 6], "warmup": 0, "decay": 2, "shape": "linear"}


def recipe(steps: int, schedule: dict[str, object]) -> Recipe:
    evaluation, checkpoint = {"every": None, "sequences": 8}, {"every": 1, "keep": 1}
    return load_recipe(
        tiny_recipe(schedule=schedule, budget={"steps": steps}, evaluation=evaluation, checkpoint=checkpoint)
    )


def steps(directory: Path) -> list[int]:
    return CheckpointStore(directory / "checkpoints").steps()


def test_ends_of_an_earlier_plan_are_kept(tmp_path: Path) -> None:
    def go_on(until: int, schedule: dict[str, object]) -> None:
        train(recipe(until, schedule), tmp_path / "run", allow=["schedule"], progress=lambda state: None)

    go_on(6, CYCLES)
    assert steps(tmp_path / "run") == [3, 6]
    go_on(8, {"kind": "constant"})
    assert steps(tmp_path / "run") == [3, 6, 8]
    go_on(12, {"kind": "linear"})
    assert steps(tmp_path / "run") == [3, 6, 8, 12] and read_record(tmp_path / "run").ends == (3, 6, 8)


def test_the_old_end_of_a_run_that_is_extended_is_kept(tmp_path: Path) -> None:
    constant = {"kind": "constant", "warmup": 0}
    for until in (3, 5, 9):
        train(recipe(until, constant), tmp_path / "run", progress=lambda state: None)
    assert steps(tmp_path / "run") == [3, 5, 9]


def test_a_record_without_ends_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    train(recipe(3, {"kind": "constant"}), tmp_path / "run", progress=lambda state: None)
    path = tmp_path / "run" / "run.json"
    stored = json.loads(path.read_text())
    del stored["ends"], stored["reference"]
    path.write_text(json.dumps(stored))
    assert read_record(tmp_path / "run").ends == () and read_record(tmp_path / "run").reference is None
    for wrong in ({"ends": ["3"]}, {"reference": {"step": "3", "fingerprint": "x"}}):
        path.write_text(json.dumps({**stored, **wrong}))
        with pytest.raises(CheckpointError, match="run.json is damaged"):
            read_record(tmp_path / "run")
