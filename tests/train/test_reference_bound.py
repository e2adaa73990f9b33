"""A run is bound to the checkpoint of its reference that it was started with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import tiny_recipe

from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.train.branch import branch_run
from torchstone.train.record import read_record
from torchstone.train.run import train


def reference(directory: Path, steps: int, keep: int) -> Path:
    given = tiny_recipe(budget={"steps": steps}, schedule={"kind": "constant", "warmup": 0}, checkpoint={"keep": keep})
    train(load_recipe(given), directory, progress=lambda state: None)
    return directory


def selective(directory: Path, steps: int, scorer: Path) -> None:
    objective = {"kind": "selective", "reference": str(scorer)}
    given = tiny_recipe(budget={"steps": steps}, schedule={"kind": "constant", "warmup": 0}, objective=objective)
    train(load_recipe(given), directory, progress=lambda state: None)


def test_the_reference_may_go_on(tmp_path: Path) -> None:
    scorer = reference(tmp_path / "scorer", 2, keep=3)
    selective(tmp_path / "run", 2, scorer)
    bound = read_record(tmp_path / "run").reference
    assert bound is not None and bound.step == 2
    reference(scorer, 4, keep=3)
    selective(tmp_path / "run", 4, scorer)
    assert read_record(tmp_path / "run").reference == bound
    branch = branch_run(tmp_path / "run", tmp_path / "branch", overrides=["budget.steps=6"])
    assert read_record(tmp_path / "branch").reference == bound
    train(branch, tmp_path / "branch", progress=lambda state: None)
    selective(tmp_path / "new", 2, scorer)
    newest = read_record(tmp_path / "new").reference
    assert newest is not None and newest.step == 4


def test_a_checkpoint_that_is_gone_or_another_is_named_with_the_field(tmp_path: Path) -> None:
    scorer = reference(tmp_path / "scorer", 2, keep=3)
    selective(tmp_path / "run", 2, scorer)
    reference(scorer, 4, keep=3)
    shutil.move(scorer / "checkpoints" / "step-00000002", tmp_path / "step")
    with pytest.raises(ConfigError, match=r"objective\.reference is .* of step 2, which is gone \(there: 4\)"):
        selective(tmp_path / "run", 4, scorer)
    manifest = tmp_path / "step" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    shutil.move(tmp_path / "step", scorer / "checkpoints" / "step-00000002")
    with pytest.raises(ConfigError, match=r"objective\.reference is .* of step 2 is another one than this run"):
        selective(tmp_path / "run", 4, scorer)
