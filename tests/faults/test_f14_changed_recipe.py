"""F14: a run is resumed with another recipe: structural changes are refused and listed, allowed ones recorded."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_recipe

from torchstone.errors import ConfigError, InterruptedRun
from torchstone.train.precision import Compute
from torchstone.train.run import train
from torchstone.train.signals import Stop

FASTER = {"kind": "adamw", "learning_rate": 6e-3}


def go(directory, until=None, allow=(), **changes):
    """Train; with `until`, stop after that step."""
    stop = Stop()

    def watch(state):
        if state["step"] == until:
            stop.ask("the test")

    recipe = tiny_recipe(**{"budget": {"steps": 6}, **changes})
    return train(recipe, directory, compute=Compute("fp32", False), progress=watch, stop=stop, allow=allow)


@pytest.fixture
def begun(tmp_path):
    with pytest.raises(InterruptedRun):
        go(tmp_path / "run", until=3)
    return tmp_path / "run"


def deeper():
    model = tiny_recipe()["model"]
    return {**model, "depth": 3, "head_dim": 16}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": deeper()}, ["model.depth was 2, now 3", "model.head_dim was 8, now 16"]),
        ({"seed": 5}, ["seed was 0, now 5"]),
        ({"batch": {"sequences": 8}}, ["batch.sequences was 4, now 8"]),
        ({"data": {"kind": "recall", "keys": 8, "values": 4, "cells": 8}}, ["data.keys was 4, now 8"]),
        ({"optimizer": FASTER}, ["optimizer.learning_rate was 0.003, now 0.006", "--allow optimizer"]),
        ({"optimizer": FASTER, "seed": 5}, ["seed was 0", "optimizer.learning_rate was 0.003"]),
    ],
)
def test_f14_structural_changes_are_refused_and_listed(begun, changes, named):
    files = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="started with another recipe") as caught:
        go(begun, **changes)
    assert all(words in str(caught.value) for words in named), str(caught.value)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == files
    assert go(begun).steps == 6  # the refusal did no harm


def test_f14_no_name_allows_a_structural_change(begun):
    for allow in (["model"], ["seed"], ["everything"]):
        with pytest.raises(ConfigError, match=f"cannot allow changes of {allow[0]}; .*: optimizer, data, schedule"):
            go(begun, seed=5, allow=allow)
    with pytest.raises(ConfigError, match="seed was 0, now 5"):
        go(begun, seed=5, allow=["optimizer", "data", "schedule"])


def test_f14_an_allowed_rate_takes_effect_and_is_recorded(begun):
    summary = go(begun, optimizer=FASTER, allow=["optimizer"])
    assert summary.history["train"]["learning_rate"] == [0.003] * 3 + [0.006] * 3
    record = json.loads((begun / "run.json").read_text())
    assert [resume["recipe"] for resume in record["resumes"]] == [["optimizer.learning_rate was 0.003, now 0.006"]]
    assert summary.taints == ()


def test_f14_what_only_decides_the_future_may_change_and_is_recorded(begun, capsys):
    falling = {"kind": "wsd", "warmup": 0, "decay": 2, "shape": "linear", "final": 0.5}
    summary = go(begun, budget={"steps": 5}, schedule=falling, evaluation={"every": 1, "sequences": 4})
    assert summary.steps == 5
    assert summary.history["train"]["learning_rate"] == pytest.approx([3e-3] * 3 + [3e-3 * 0.75, 3e-3 * 0.5])
    shown = capsys.readouterr().err
    (resume,) = json.loads((begun / "run.json").read_text())["resumes"]
    for change in ("budget.steps was 6, now 5", "schedule.kind was 'constant', now 'wsd'"):
        assert change in resume["recipe"] and change in shown
    assert resume["rates"] == []


LINEAR = {"kind": "linear", "warmup": 0, "final": 0.5}


def test_f14_another_plan_for_steps_already_done_is_refused_with_the_step_and_both_rates(begun):
    files = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    words = (
        r"under another plan: step 1, which is done, had the learning rate 0\.003 \(1 of the peak\), and this schedule and "
        r"budget give it 0\.0027 \(0\.9 of the peak\)\. Restore .* --branch RUN .* --allow schedule"
    )
    with pytest.raises(ConfigError, match=words):
        go(begun, schedule=LINEAR)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == files
    assert go(begun).steps == 6  # the refusal did no harm


def test_f14_a_budget_that_moves_a_fraction_is_refused_with_the_steps_to_write(tmp_path):
    schedule = {"kind": "constant", "warmup": 0.5}
    with pytest.raises(InterruptedRun):
        go(tmp_path / "run", until=3, schedule=schedule)
    with pytest.raises(
        ConfigError, match=r"step 0, which is done.*give them in steps \(they were: warmup 3, stable 3\)"
    ):
        go(tmp_path / "run", budget={"steps": 10}, schedule=schedule)
    assert go(tmp_path / "run", budget={"steps": 10}, schedule={**schedule, "warmup": 3}).steps == 10


def test_f14_a_plan_that_is_accepted_is_recorded_and_binds_only_later_steps(begun):
    with pytest.raises(InterruptedRun):
        go(begun, until=5, schedule=LINEAR, allow=["schedule"])
    record = json.loads((begun / "run.json").read_text())
    assert record["rates_from"] == 3 and record["resumes"][-1]["rates"][0].startswith("step 1, which is done")
    like_both = {"kind": "wsd", "warmup": 0, "decay": 3, "shape": "linear", "final": 0.5}
    with pytest.raises(ConfigError, match="step 3, which is done, had the learning rate 0.0021"):
        go(begun, schedule=like_both)
    assert go(begun, schedule=LINEAR).history["train"]["learning_rate"] == pytest.approx(
        [3e-3, 3e-3, 3e-3, 2.1e-3, 1.8e-3, 1.5e-3]
    )


def test_f14_a_budget_below_what_is_done_ends_the_run_where_it_is(begun):
    summary = go(begun, budget={"steps": 2})
    assert summary.steps == 3 and summary.history["validation"]["steps"] == [3]
