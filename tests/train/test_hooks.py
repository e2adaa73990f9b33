"""What objectives may ask of training: divisors, plans over the global batch, numbers for the record, a reference."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_recipe

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.objectives.next_token import NextToken
from torchstone.recipe.load import load_recipe
from torchstone.train.budget import data_of
from torchstone.train.distributed import World
from torchstone.train.hooks import ObjectiveHooks
from torchstone.train.precision import Compute
from torchstone.train.reference import open_reference
from torchstone.train.run import train

ALONE = World(0, 1, torch.device("cpu"))


class Halved(NextToken):
    """Divides by half the targets, and plans."""

    def __init__(self) -> None:
        super().__init__()
        self.planned: list[int] = []
        self.world = None

    def join(self, world):
        self.world = world

    def divisor(self, count: float) -> float:
        return count / 2

    def plan(self, model, batches, autocast):
        assert not torch.is_grad_enabled()
        with autocast():
            self.planned.append(len(batches))
        return [batch.map(lambda tensor: tensor) for batch in batches]

    def step_metrics(self, total):
        return {"plans": float(total(torch.tensor(float(len(self.planned)))))}


def batches(count):
    tokens = torch.zeros(2, 3, dtype=torch.long)
    return [Batch(tokens, tokens) for _ in range(count)]


def test_an_objective_without_hooks_changes_nothing():
    hooks, given = ObjectiveHooks(NextToken(), None, ALONE), batches(2)
    assert hooks.targets(given[0]) == 6
    assert float(hooks.divisor(torch.tensor(12.0))) == 12
    assert hooks.planned(iter(given), torch.no_grad) is not None and hooks.metrics() == {}


def test_hooks_are_called_and_a_plan_only_for_several_micro_batches():
    objective = Halved()
    hooks = ObjectiveHooks(objective, None, ALONE)
    assert objective.world is ALONE
    assert float(hooks.divisor(torch.tensor(12.0))) == 6
    assert len(list(hooks.planned(iter(batches(1)), torch.no_grad))) == 1 and objective.planned == []
    assert len(list(hooks.planned(iter(batches(3)), torch.no_grad))) == 3 and objective.planned == [3]
    assert hooks.metrics() == {"plans": 1.0}


def test_gathering_alone_is_the_values_themselves():
    values = torch.arange(5.0)
    assert ALONE.gather(values) is values


def reference_run(directory, **changes):
    train(tiny_recipe(**changes), directory, compute=Compute("fp32", False), progress=lambda state: None)
    return directory


def with_reference(directory, **changes):
    objective = {"kind": "selective", "reference": str(directory)}
    return tiny_recipe(objective=objective, **changes)


def test_a_run_names_its_reference_and_is_bound_to_its_weights(tmp_path):
    reference = reference_run(tmp_path / "reference")
    recipe = load_recipe(with_reference(reference))
    opened = open_reference(recipe, data_of(recipe))
    assert not opened.model.training and not any(p.requires_grad for p in opened.model.parameters())
    train(recipe, tmp_path / "run", compute=Compute("fp32", False), progress=lambda state: None)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert stored == opened.with_data(data_of(recipe).fingerprint) != data_of(recipe).fingerprint
    other = open_reference(load_recipe(with_reference(reference_run(tmp_path / "other", seed=5))), data_of(recipe))
    assert other.with_data("x") != opened.with_data("x")


def test_a_reference_of_other_tokens_is_refused(tmp_path):
    data = {"kind": "recall", "keys": 5, "values": 4, "cells": 8}
    reference = reference_run(tmp_path / "reference", data=data)
    recipe = load_recipe(with_reference(reference))
    with pytest.raises(ConfigError, match=r"reference vocab \d+ ≠ model vocab \d+"):
        open_reference(recipe, data_of(recipe))


def test_a_reference_that_is_no_run_is_refused(tmp_path):
    recipe = load_recipe(with_reference(tmp_path))
    with pytest.raises(ConfigError, match="holds no run"):
        open_reference(recipe, data_of(recipe))
