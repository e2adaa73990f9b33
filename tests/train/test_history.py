"""A summary speaks of steps that the run has: records of steps that a kill undid are left out."""

from __future__ import annotations

from tiny import tiny_recipe

from torchstone.storage.journal import Journal
from torchstone.train.events import METRICS, read_history
from torchstone.train.precision import Compute
from torchstone.train.run import train


def test_records_beyond_the_last_step_are_left_out(tmp_path):
    journal = Journal(tmp_path / METRICS)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        journal.append({"kind": "train", "step": step, "tokens": step, "flops": 1.0, "seconds": 1.0, "loss": loss})
    assert read_history(tmp_path)[0]["train"]["loss"] == [3.0, 2.0, 9.0]
    assert read_history(tmp_path, 2)[0]["train"]["loss"] == [3.0, 2.0]


def test_a_shortened_run_reports_its_own_last_evaluation(tmp_path):
    (tmp_path / "run").mkdir()
    ghost = {"kind": "validation", "step": 7, "tokens": 7, "flops": 1.0, "seconds": 1.0, "loss": 99.0, "accuracy": 0.0}
    recipe = tiny_recipe(budget={"steps": 2})
    train(recipe, tmp_path / "run", compute=Compute("fp32", False), progress=lambda state: None)
    Journal(tmp_path / "run" / METRICS).append(ghost)
    again = train(recipe, tmp_path / "run", compute=Compute("fp32", False), progress=lambda state: None)
    assert again.final["validation_loss"] < 90
