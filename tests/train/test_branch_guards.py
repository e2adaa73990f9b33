"""Where a decay may begin under a plan that changed, and places where a branch cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.train import descend
from torchstone.train.branch import branch_run
from torchstone.train.record import read_record
from torchstone.train.run import train

CONSTANT, FALLING = {"kind": "constant", "warmup": 0}, {"kind": "linear", "warmup": 0}


def run(directory: Path, steps: int, schedule: dict[str, Any], **options: Any) -> Path:
    own = {"evaluation": {"every": 4, "sequences": 8}, "checkpoint": {"every": 2, "keep": 9}}
    given = load_recipe(tiny_recipe(schedule=schedule, budget={"steps": steps}, **own))
    train(given, directory, progress=lambda state: None, **options)
    return directory


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return run(tmp_path / "parent", 4, CONSTANT)


def test_a_decay_begins_where_the_rate_was_at_its_peak_under_the_plan_of_then(tmp_path: Path, parent: Path) -> None:
    run(parent, 8, FALLING, allow=["schedule"])  # steps 0 to 3 had the peak, later ones less
    branch_run(f"{parent}@4", tmp_path / "early", decay=2)
    with pytest.raises(ConfigError, match=r"at step 6 is 0\.\d+ of its peak"):
        branch_run(f"{parent}@6", tmp_path / "late", decay=2)
    fell = run(tmp_path / "fell", 4, FALLING)
    run(fell, 8, CONSTANT, allow=["schedule"])  # the plan of now says that step 3 had the peak
    with pytest.raises(ConfigError, match=r"at step 4 is 0 of its peak"):
        branch_run(f"{fell}@4", tmp_path / "wrong", decay=2)
    branch_run(f"{fell}@6", tmp_path / "right", decay=2)


def test_a_branch_goes_on_without_its_parent(tmp_path: Path, parent: Path) -> None:
    again = branch_run(f"{parent}@2", tmp_path / "branch", decay=2)
    shutil.rmtree(parent)
    for name in (f"{parent}@2", str(parent), str(parent / "checkpoints" / "step-00000002")):
        assert branch_run(name, tmp_path / "branch", decay=2) == again
    train(again, tmp_path / "branch", progress=lambda state: None)
    for name in (f"{parent}@3", f"{tmp_path / 'other'}@2"):
        with pytest.raises(ConfigError, match="holds no run"):
            branch_run(name, tmp_path / "branch")


def test_places_where_no_branch_can_be(tmp_path: Path, parent: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(ConfigError, match=f"{name} is a symbolic link, .* where the link leads"):
            branch_run(f"{parent}@2", tmp_path / name)
    for inside in (parent / "branch", parent / "checkpoints" / "deep" / "branch"):
        with pytest.raises(ConfigError, match="lies inside the run directory .*parent"):
            branch_run(f"{parent}@2", inside)
        with pytest.raises(ConfigError, match="lies inside the run directory .*parent"):
            run(inside, 2, CONSTANT)


def test_another_process_that_makes_the_branch_first_is_named(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = descend.write_record
    made: list[bool] = []

    def slow(*given: Any) -> None:
        if not made:
            made.append(True)
            branch_run(f"{parent}@2", tmp_path / "branch")
        write(*given)

    monkeypatch.setattr(descend, "write_record", slow)
    with pytest.raises(ConfigError, match="another process has made .*branch meanwhile"):
        branch_run(f"{parent}@2", tmp_path / "branch")
    assert read_record(tmp_path / "branch").origin is not None


def test_a_refused_branch_speaks_of_the_parent(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(ConfigError, match="the parent was trained with another recipe: seed .* without --branch"):
        branch_run(f"{parent}@2", tmp_path / "branch", overrides=["seed=5"])


def test_another_kind_of_optimizer_is_not_said_to_be_allowable(parent: Path) -> None:
    given = load_recipe(
        tiny_recipe(optimizer={"kind": "sgdm", "learning_rate": 0.1}, schedule=CONSTANT, budget={"steps": 8})
    )
    with pytest.raises(ConfigError, match="optimizer.kind was") as caught:
        train(given, parent, progress=lambda state: None)
    assert "--allow" not in str(caught.value)


def test_ends_of_cycles_that_moved_are_named(tmp_path: Path) -> None:
    cycles = {"kind": "wsd-s", "cycles": 2, "warmup": 0, "decay": 1, "shape": "linear"}
    directory = run(tmp_path / "cycles", 8, cycles)
    with pytest.raises(ConfigError, match=r"schedule\.cycles=\[4,8\]"):
        run(directory, 12, cycles)
    run(directory, 12, {**cycles, "cycles": [4, 8]})
