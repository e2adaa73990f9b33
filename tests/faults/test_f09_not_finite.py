"""F9: nan loss, inf gradient, nan in a parameter, nan on one rank only: stop before the update, with a bundle (P8)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import tiny_recipe
from torchrun import notes, torchrun

from torchstone.errors import NonFiniteError
from torchstone.objectives.next_token import LossOutput, NextToken
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.loop import Callback
from torchstone.train.precision import Compute
from torchstone.train.run import load_run, train

RECIPE = tiny_recipe(budget={"steps": 6}, checkpoint={"every": 1, "keep": 3}, batch={"sequences": 4, "micro": 2})
PLANTED = 2  # updates before the fault


class Watch(Callback):
    """Plants the fault after some updates, and remembers the model and its weights at that moment."""

    def __init__(self, plant):
        self.plant = plant
        self.model, self.weights = None, {}

    def on_step(self, view):
        if view.position.step == PLANTED:
            self.plant(view.model)
            self.model = view.model
            self.weights = {name: value.detach().clone() for name, value in view.model.named_parameters()}


def nan_loss(model):
    """The loss of the second micro-batch is nan; the fixture puts the objective back."""
    plain, calls = NextToken.forward, []

    def forward(self, model, batch):
        found = plain(self, model, batch)
        calls.append(batch)
        factor = math.nan if len(calls) == 2 else 1.0
        return LossOutput(found.loss_sum * factor, found.count, found.per_token_bt, found.correct_bt)

    NextToken.forward = forward


def infinite_gradient(model):
    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = math.inf
        return gradient

    list(model.parameters())[-1].register_hook(spoil)


def nan_parameter(model):
    """Bad memory: a weight turns nan between two steps, after the checkpoint."""

    def spoil(module, arguments):
        with torch.no_grad():
            list(module.parameters())[2].view(-1)[0] = math.nan

    model.register_forward_pre_hook(spoil)


@pytest.fixture(autouse=True)
def objective(monkeypatch):
    monkeypatch.setattr(NextToken, "forward", NextToken.forward)


@pytest.mark.parametrize(
    "plant, word",
    [(nan_loss, "loss is nan"), (infinite_gradient, "gradient.norm is inf"), (nan_parameter, "loss is nan")],
)
def test_f09_it_stops_before_the_update(tmp_path, plant, word):
    watch = Watch(plant)
    with pytest.raises(NonFiniteError, match=word) as caught:
        train(RECIPE, tmp_path / "run", compute=Compute("fp32", False), progress=lambda state: None, callbacks=[watch])
    assert caught.value.exit_code == 4
    for name, value in watch.model.named_parameters():
        intact = torch.isfinite(value)
        assert torch.equal(value[intact], watch.weights[name][intact]), f"{name} was updated"
        assert (~intact).sum() <= 1

    (path,) = (tmp_path / "run" / "crash").iterdir()
    assert str(path) in str(caught.value)
    bundle = json.loads(path.read_text())
    assert bundle["step"] == PLANTED and bundle["seed"] == RECIPE.get("seed", 0)
    assert len(bundle["documents"]) == 4
    assert bundle["documents"][0][0]["id"] == "recall/seed 0/step 2/row 0"
    norms = [value for entry in bundle["parameters"].values() for value in entry.values()]
    assert any(isinstance(value, str) for value in norms), "no norm shows the fault"
    assert any(isinstance(value, float) for value in norms)

    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.latest() == PLANTED
    _, model, _ = load_run(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in model.parameters())


def test_f09_the_cause_gone_the_same_call_continues(tmp_path):
    options = {"compute": Compute("fp32", False), "progress": lambda state: None}
    with pytest.raises(NonFiniteError):
        train(RECIPE, tmp_path / "run", callbacks=[Watch(infinite_gradient)], **options)
    resumed = train(RECIPE, tmp_path / "run", **options)
    whole = train(RECIPE, tmp_path / "whole", **options)
    assert resumed.history["train"]["loss"] == whole.history["train"]["loss"]


def test_f09_nan_on_rank_1_only_stops_every_rank(tmp_path):
    """Two gloo processes; the fault counts forward passes, one per step and rank."""
    directory = tmp_path / "pair" / "run"
    directory.parent.mkdir()
    found = torchrun(RECIPE, directory, poisoned_rank=1, poisoned_step=PLANTED)
    assert found.returncode != 0
    assert "exitcode  : 4" in found.stderr.replace("exitcode: ", "exitcode  : "), found.stderr[-3000:]
    for rank in (0, 1):
        assert notes(directory, rank)["error"].startswith(f"NonFiniteError: at step {PLANTED} "), rank
    assert [path.name for path in (directory / "crash").iterdir()] == ["step-00000002.json"]
    assert CheckpointStore(directory / "checkpoints").load().step == PLANTED
    _, model, _ = load_run(directory)
    assert all(torch.isfinite(value).all() for value in model.parameters())
