"""F15: a run is resumed with other threads, torch or world size: it says so and continues order-exact (P3)."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_recipe

from torchstone.data.synthetic.task import Task
from torchstone.errors import InterruptedRun
from torchstone.train import resume
from torchstone.train.precision import Compute
from torchstone.train.run import train
from torchstone.train.signals import Stop

RECIPE = tiny_recipe(budget={"steps": 6})


def go(directory, until=None, recipe=RECIPE):
    """Train; with `until`, stop after that step."""
    stop = Stop()

    def watch(state):
        if state["step"] == until:
            stop.ask("the test")

    return train(recipe, directory, compute=Compute("fp32", False), progress=watch, stop=stop)


@pytest.fixture
def threads():
    yield
    torch.set_num_threads(1)


@pytest.fixture
def order(monkeypatch):
    """Numbers of the sequences of every training batch, as they are asked for."""
    seen, plain = [], Task.batch

    def batch(self, seed, step, size, start=0, stop=None):
        found = plain(self, seed, step, size, start, stop)
        seen.append(found.rows)
        return found

    monkeypatch.setattr(Task, "batch", batch)
    return seen


def message(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "the environment differs" in line]


def test_f15_other_threads_and_torch_continue_order_exact(tmp_path, order, threads, monkeypatch, capsys):
    whole = go(tmp_path / "whole")
    expected = [rows for rows in order if rows]
    order.clear()
    with pytest.raises(InterruptedRun):
        go(tmp_path / "run", until=3)
    assert message(capsys) == []
    torch.set_num_threads(2)
    before = resume.torch_version()
    monkeypatch.setattr(resume, "torch_version", lambda: "9.9.9+other")
    summary = go(tmp_path / "run")
    (line,) = message(capsys)
    assert f"torch was {before}, now 9.9.9+other" in line and "threads was 1, now 2" in line
    assert "order-exact, not bitwise" in line
    assert order == expected
    assert summary.history["train"]["loss"] == pytest.approx(whole.history["train"]["loss"], rel=1e-4)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["environment"]["threads"] == 1
    assert [len(entry["environment"]) for entry in record["resumes"]] == [2]
    assert summary.taints == ()


def test_f15_another_world_size_is_reported(tmp_path, capsys):
    """The run was started by two ranks, which the record says; here one process takes all rows."""
    with pytest.raises(InterruptedRun):
        go(tmp_path / "run", until=3)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["environment"]["world"] = 2
    path.write_text(json.dumps(record))
    assert go(tmp_path / "run").steps == 6
    (line,) = message(capsys)
    assert "world was 2, now 1" in line and "order-exact" in line


def test_f15_another_micro_batch_is_reported_and_changes_rounding_only(tmp_path, capsys):
    whole = go(tmp_path / "whole")
    with pytest.raises(InterruptedRun):
        go(tmp_path / "run", until=3)
    summary = go(tmp_path / "run", recipe={**RECIPE, "batch": {"sequences": 4, "micro": 1}})
    (line,) = message(capsys)
    assert "batch.micro was None, now 1" in line
    assert summary.history["train"]["loss"] == pytest.approx(whole.history["train"]["loss"], rel=1e-4)


def test_f15_the_same_environment_is_bitwise_and_silent(tmp_path, capsys):
    whole = go(tmp_path / "whole")
    with pytest.raises(InterruptedRun):
        go(tmp_path / "run", until=3)
    summary = go(tmp_path / "run")
    assert message(capsys) == []
    assert summary.history["train"]["loss"] == whole.history["train"]["loss"]
