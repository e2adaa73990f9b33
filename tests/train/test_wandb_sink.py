"""The Weights & Biases sink against a stand-in for its module: one run per directory, kept across resumes."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from tiny import tiny_recipe

from torchstone.train.precision import Compute
from torchstone.train.run import train


class Stand:
    """What the sink uses of `wandb`, recording every call."""

    def __init__(self) -> None:
        self.__spec__ = ModuleSpec("wandb", None)
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return SimpleNamespace(log=lambda numbers, step: self.logged.append((step, numbers)), finish=self._finish)

    def _finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    stand = Stand()
    monkeypatch.setitem(sys.modules, "wandb", stand)
    return stand


def run(directory, steps):
    recipe = tiny_recipe(budget={"steps": steps}, sinks=["wandb"])
    train(recipe, directory, compute=Compute("fp32", False), progress=lambda state: None)


def test_numbers_arrive_and_a_continued_run_keeps_its_id(wandb, tmp_path):
    run(tmp_path / "run", 3)
    run(tmp_path / "run", 5)
    first, second = wandb.started
    assert first["id"] == second["id"]
    assert (first["resume"], first["name"]) == ("allow", "run")
    assert first["config"]["budget"]["steps"] == 3
    assert wandb.finished == 2
    training = [step for step, numbers in wandb.logged if "train/loss" in numbers]
    assert training == [1, 2, 3, 4, 5]
    assert [step for step, numbers in wandb.logged if "validation/loss" in numbers] == [3, 5]
