"""`train` end to end: what it leaves, resume, finished runs, budgets, precision, accumulation, callbacks, sinks."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from tiny import tiny_recipe

import torchstone.train
from torchstone.errors import BudgetError, ConfigError, DataError, DependencyError, InterruptedRun, NonFiniteError
from torchstone.recipe.load import load_recipe
from torchstone.train import precision
from torchstone.train.budget import counts_of, steps_of, tokens_per_step
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.distributed import World
from torchstone.train.evaluate import evaluate
from torchstone.train.events import read_history
from torchstone.train.loop import Callback
from torchstone.train.precision import Compute
from torchstone.train.run import load_run, train
from torchstone.train.signals import Stop

PLAIN = Compute("fp32", False)


def run(directory, options=None, **changes):
    return train(tiny_recipe(**changes), directory, progress=lambda state: None, **(options or {}))


@pytest.fixture
def text_data(tmp_path):
    """A small corpus of text, tokenised into the test's own folder."""
    rows = "".join(json.dumps({"text": f"row {n}: {n} and {n} is {n + n}."}) + "\n" for n in range(400))
    (tmp_path / "rows.jsonl").write_text(rows)
    corpus = {"kind": "files", "paths": str(tmp_path / "rows.jsonl")}
    return {"kind": "text", "corpus": corpus, "tokenizer": "bytes", "length": 32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))


def test_a_run_leaves_what_its_docstring_says(tmp_path):
    summary = run(tmp_path / "run", evaluation={"every": 2, "sequences": 8})
    assert {item.name for item in (tmp_path / "run").iterdir()} == {
        "recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "summary.json",
    }  # fmt: skip
    recipe = load_recipe(tiny_recipe(evaluation={"every": 2, "sequences": 8}))
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert (summary.steps, summary.tokens) == (3, 3 * tokens_per_step(recipe))
    assert summary.flops == pytest.approx(summary.tokens * counts_of(recipe).training_flops_per_token)
    assert summary.checkpoint.is_dir() and summary.checkpoint.name == "step-00000003"
    assert summary.history["train"]["steps"] == [1, 2, 3]
    assert summary.history["validation"]["steps"] == [2, 3]
    assert summary.final["validation_loss"] == summary.history["validation"]["loss"][-1]
    assert summary.seconds > 0 and summary.peak_bytes > 1e6 and summary.taints == ()


def test_it_learns_and_text_has_bits_per_byte(tmp_path, text_data):
    summary = run(tmp_path / "run", data=text_data, budget={"steps": 60}, evaluation={"every": 30, "sequences": 8})
    losses = summary.history["validation"]["loss"]
    assert losses[-1] < losses[0] < math.log(300)
    assert summary.final["bits_per_byte"] < 5


def test_a_finished_run_returns_at_once_and_a_larger_budget_continues_it(tmp_path):
    first = run(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = run(tmp_path / "run")
    assert again == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    longer = run(tmp_path / "run", budget={"steps": 5})
    assert longer.history["train"]["steps"] == [1, 2, 3, 4, 5]
    whole = run(tmp_path / "whole", budget={"steps": 5}, schedule={"kind": "constant"})
    assert longer.history["train"]["loss"] == whole.history["train"]["loss"]


def test_no_resume_refuses_a_directory_with_a_run(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        run(tmp_path / "run", {"resume": False})


def test_the_module_is_the_verb(tmp_path):
    summary = torchstone.train(tiny_recipe(), tmp_path / "run", progress=lambda state: None)
    assert summary.steps == 3


def test_progress_hears_every_step(tmp_path):
    heard = []
    train(tiny_recipe(), tmp_path / "run", progress=heard.append)
    assert [state["step"] for state in heard] == [1, 2, 3]
    assert all(state["steps"] == 3 and state["tokens_per_second"] > 0 for state in heard)


# Budgets and accumulation -------------------------------------------------------------------------


def test_every_unit_of_a_budget_becomes_whole_steps():
    base = load_recipe(tiny_recipe())
    per_step, counts = tokens_per_step(base), counts_of(base)
    units = {
        "steps": 7,
        "tokens": 6 * per_step + 1,
        "flops": counts.training_flops_per_token * 6.5 * per_step,
        "tokens_per_parameter": 6.5 * per_step / counts.non_embedding,
    }
    for unit, value in units.items():
        assert steps_of(load_recipe(tiny_recipe(budget={unit: value}))) == 7, unit
    assert steps_of(load_recipe(tiny_recipe(budget={"tokens": 6 * per_step}))) == 6


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(BudgetError, match=r"1 tokens buys .* steps of 64 tokens; give at least one step"):
        steps_of(load_recipe(tiny_recipe(budget={"tokens": 1})))


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_changes_nothing_but_rounding(tmp_path, micro):
    """Also with pieces of unequal size (micro 3 of 4 sequences): losses are summed, not averaged by piece."""
    whole = run(tmp_path / "whole", budget={"steps": 8})
    parts = run(tmp_path / "parts", budget={"steps": 8}, batch={"sequences": 4, "micro": micro})
    assert parts.history["train"]["loss"] == pytest.approx(whole.history["train"]["loss"], rel=2e-5)
    assert parts.history["train"]["gradient_norm"] == pytest.approx(whole.history["train"]["gradient_norm"], rel=2e-4)


def test_micro_batches_with_unequal_targets_weigh_every_target_alike(tmp_path, text_data):
    """Masked documents leave a different number of targets in each row."""
    masked = {**text_data, "mask_documents": True}
    whole = run(tmp_path / "whole", data=masked, budget={"steps": 4})
    parts = run(tmp_path / "parts", data=masked, budget={"steps": 4}, batch={"sequences": 4, "micro": 1})
    assert parts.history["train"]["loss"] == pytest.approx(whole.history["train"]["loss"], rel=2e-5)


# Precision ----------------------------------------------------------------------------------------


def test_auto_is_measured_recorded_and_reused(tmp_path, monkeypatch):
    seconds = {"fp32": 2.0, "bf16": 1.0}
    timed = []

    def clock(recipe, compute, device):
        timed.append(compute)
        return seconds[compute.precision], 5.0

    monkeypatch.setattr(precision, "_seconds", clock)
    changes = {"precision": "auto", "compile": "auto"}
    with pytest.raises(InterruptedRun):
        stop = Stop()
        stop.ask("the test")
        run(tmp_path / "run", {"stop": stop}, **changes)
    assert timed == [Compute("fp32", False), Compute("bf16", False)]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["compute"] == {"precision": "bf16", "compile": False}
    seconds["fp32"] = 0.1
    timed.clear()
    run(tmp_path / "run", **changes)
    assert timed == []
    assert json.loads((tmp_path / "run" / "run.json").read_text())["compute"]["precision"] == "bf16"


def test_compiling_is_measured_only_where_it_can_pay(monkeypatch):
    costs = {False: (1.0, 2.0), True: (0.5, 60.0)}
    monkeypatch.setattr(precision, "_seconds", lambda recipe, compute, device: costs[compute.compile])
    choose = precision.choose_compute
    short, long = (tiny_recipe(compile="auto", budget={"steps": steps}) for steps in (100, 1000))
    assert choose(load_recipe(short)).compile is False
    assert choose(load_recipe(long)).compile is True
    costs[True] = (0.99, 60.0)
    assert choose(load_recipe(long)).compile is False


def test_bf16_trains_close_to_fp32(tmp_path):
    exact = run(tmp_path / "fp32", budget={"steps": 5})
    rough = run(tmp_path / "bf16", budget={"steps": 5}, precision="bf16")
    assert rough.history["train"]["loss"] != exact.history["train"]["loss"]
    assert rough.history["train"]["loss"] == pytest.approx(exact.history["train"]["loss"], rel=0.02)


# Evaluation, loading, callbacks -------------------------------------------------------------------


def test_loading_gives_the_model_whose_loss_was_recorded(tmp_path):
    summary = run(tmp_path / "run", budget={"steps": 10})
    recipe, model, data = load_run(tmp_path / "run")
    world = World(0, 1, torch.device("cpu"))
    objective = recipe.objective.build()
    for rows in (1, 4, 64):
        found = evaluate(model, objective, data, 8, rows, PLAIN, world)
        assert found["loss"] == pytest.approx(summary.final["validation_loss"], rel=1e-5)
        assert found["accuracy"] == pytest.approx(summary.final["accuracy"])
    assert not model.training
    model.train()
    assert evaluate(model, objective, data, 8, 4, PLAIN, world) == evaluate(model, objective, data, 8, 4, PLAIN, world)
    assert model.training


def test_loading_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run"):
        load_run(tmp_path)


def test_callbacks_add_to_the_validation_record_and_cannot_move_training(tmp_path):
    class Noisy(Callback):
        def __init__(self):
            self.steps = []

        def on_evaluation(self, view):
            torch.rand(5)
            self.steps.append(view.position.step)
            return {"mine": float(view.position.step), "width": view.recipe.model.width}

    noisy = Noisy()
    changes = {"evaluation": {"every": 1, "sequences": 8}}
    summary = run(tmp_path / "run", {"callbacks": [noisy]}, **changes)
    assert noisy.steps == [1, 2, 3]
    assert summary.history["validation"]["mine"] == [1.0, 2.0, 3.0]
    assert summary.final["width"] == 32
    quiet = run(tmp_path / "quiet", **changes)
    assert quiet.history["train"]["loss"] == summary.history["train"]["loss"]


def test_an_evaluation_without_a_number_is_an_error_not_a_record(tmp_path):
    class Broken(Callback):
        def on_evaluation(self, view):
            return {"mine": math.inf}

    with pytest.raises(NonFiniteError, match=r"after step 3 gives no number \(mine is inf\)"):
        run(tmp_path / "run", {"callbacks": [Broken()]})
    assert read_history(tmp_path / "run")[0]["validation"]["loss"] == []


def test_changed_optimizer_settings_take_effect_where_they_are_allowed(tmp_path):
    run(tmp_path / "run", budget={"steps": 2})
    optimizer = {"kind": "adamw", "learning_rate": 3e-3, "weight_decay": 0.7, "betas": [0.5, 0.6]}
    run(tmp_path / "run", {"allow": ["optimizer"]}, budget={"steps": 3}, optimizer=optimizer)
    groups = CheckpointStore(tmp_path / "run" / "checkpoints").load().data["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert all(list(group["betas"]) == [0.5, 0.6] for group in groups)


# Records and sinks --------------------------------------------------------------------------------


def test_torn_and_foreign_lines_of_the_metrics_are_ignored_and_reported(tmp_path, capsys):
    summary = run(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'\x00\xff garbage\n{"note": "no metric"}\n{"kind": "train", "step": 4, "lo')
    history, warnings = read_history(tmp_path / "run")
    assert history == summary.history
    assert len(warnings) == 3
    assert run(tmp_path / "run").final == summary.final
    assert capsys.readouterr().err.count("ignored") == 3


def test_lost_metrics_of_a_finished_run_are_a_typed_error(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no complete training and validation record"):
        run(tmp_path / "run")


def test_a_repeated_step_counts_once(tmp_path):
    with pytest.raises(InterruptedRun):
        stop = Stop()
        train(
            tiny_recipe(), tmp_path / "run", stop=stop,
            progress=lambda state: stop.ask("the test") if state["step"] == 2 else None,
        )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n")
    assert run(tmp_path / "run").history["train"]["steps"] == [1, 2, 3]


def test_tensorboard_receives_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = run(tmp_path / "run", sinks=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/loss")]
    assert found == pytest.approx(summary.history["train"]["loss"], rel=1e-6)
    assert "validation/accuracy" in events.Tags()["scalars"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_sink_that_is_not_installed_says_how_to_install_it(tmp_path):
    with pytest.raises(DependencyError, match=r"pip install 'torchstone\[wandb\]'"):
        run(tmp_path / "run", sinks=["wandb"])


def test_taints_survive_a_crash_right_after_the_resume(tmp_path):
    """The record of the resume is written before the checkpoint that carries the taint."""
    with pytest.raises(InterruptedRun):
        stop = Stop()
        stop.ask("the test")
        run(tmp_path / "run", {"stop": stop})
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["resumes"].append({"recipe": [], "environment": [], "taints": ["the data changed within the run"]})
    path.write_text(json.dumps(record))
    assert run(tmp_path / "run").taints == ("the data changed within the run",)


@pytest.mark.parametrize("content", ["{", "[]", '{"data": 1}'])
def test_a_damaged_record_of_the_run_is_named(tmp_path, content):
    with pytest.raises(InterruptedRun):
        stop = Stop()
        stop.ask("the test")
        run(tmp_path / "run", {"stop": stop})
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run(tmp_path / "run")
