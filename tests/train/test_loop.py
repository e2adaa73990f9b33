"""The loop's order of things: evaluations that are interrupted, streams that nothing advances, devices, clipping."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import tiny_recipe

from torchstone.errors import ConfigError, InterruptedRun
from torchstone.recipe.load import load_recipe
from torchstone.train import precision
from torchstone.train.budget import counts_of
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.distributed import World
from torchstone.train.loop import Callback, Trainer, dropout_stream
from torchstone.train.precision import Compute
from torchstone.train.run import train
from torchstone.train.signals import Stop

CPU = torch.device("cpu")
PLAIN = Compute("fp32", False)


def trainer(**changes):
    recipe = load_recipe(tiny_recipe(**changes))
    data = recipe.data.build(None)
    model = recipe.model.build(data.vocab_size, data.length, recipe.seed)
    return Trainer(recipe, model, data, PLAIN, World(0, 1, CPU), 100, counts_of(recipe))


class StopWhileEvaluating(Stop):
    """Asked for by the n-th question within an evaluation."""

    def __init__(self, evaluations: int) -> None:
        super().__init__()
        self.left = evaluations

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left < 0


def quiet(directory, stop=None, **changes):
    return train(tiny_recipe(**changes), directory, compute=PLAIN, progress=lambda state: None, stop=stop)


@pytest.mark.parametrize("questions", range(9))
def test_a_run_that_is_stopped_at_any_question_ends_as_if_it_had_not_been(tmp_path, questions):
    """Also inside an evaluation, which the resumed run then makes whole."""
    changes = {"evaluation": {"every": 1, "sequences": 8}, "batch": {"sequences": 4, "micro": 4}}
    whole = quiet(tmp_path / "whole", **changes)
    stop = StopWhileEvaluating(questions)
    with pytest.raises(InterruptedRun):
        quiet(tmp_path / "run", stop=stop, **changes)
    resumed = quiet(tmp_path / "run", **changes)
    for kind in ("train", "validation"):
        for name in ("steps", "tokens", "loss"):
            assert resumed.history[kind][name] == whole.history[kind][name]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6, "a step or an evaluation was recorded twice"


def test_a_stop_in_the_last_evaluation_leaves_only_that_to_do(tmp_path):
    questions = 3 + 1  # one before each step, then one in the evaluation's first batch
    with pytest.raises(InterruptedRun, match="after step 3 of 3"):
        quiet(tmp_path / "run", stop=StopWhileEvaluating(questions - 1))
    assert CheckpointStore(tmp_path / "run" / "checkpoints").latest() == 3
    assert not (tmp_path / "run" / "summary.json").exists()
    assert quiet(tmp_path / "run").history["validation"]["steps"] == [3]


def test_dropout_draws_from_a_stream_of_its_step_and_leaves_the_default_one_alone():
    before = torch.random.get_rng_state()
    draws = {}
    for key in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)):
        with dropout_stream(*key, CPU):
            draws[key] = torch.rand(3).tolist()
    assert torch.equal(before, torch.random.get_rng_state())
    assert len({tuple(draw) for draw in draws.values()}) == 4
    with dropout_stream(0, 1, 0, CPU):
        assert torch.rand(3).tolist() == draws[0, 1, 0]


def test_training_neither_reads_nor_moves_the_default_generator(tmp_path):
    mixer = {"kind": "attention", "dropout": 0.2}
    model = {**tiny_recipe()["model"], "block": {"mixer": mixer}}
    torch.random.default_generator.manual_seed(1)
    before = torch.random.get_rng_state()
    first = quiet(tmp_path / "one", model=model)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.random.default_generator.manual_seed(2)
    assert quiet(tmp_path / "two", model=model).history["train"]["loss"] == first.history["train"]["loss"]


def test_clipping_bounds_the_update_and_reports_the_norm_before():
    clipped, free = (trainer(optimizer={"kind": "adamw", "clip": clip, "learning_rate": 1e-3}) for clip in (1e-3, None))
    norms = [one.step()["gradient_norm"] for one in (clipped, free)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.1
    left = math.sqrt(sum(float(value.grad.square().sum()) for value in clipped.model.parameters()))
    assert left == pytest.approx(1e-3, rel=1e-3)


def test_callbacks_see_every_step_with_its_metrics(tmp_path):
    class Watch(Callback):
        seen: list[tuple[int, float]] = []

        def on_step(self, view):
            self.seen.append((view.position.step, view.metrics["loss"]))

    summary = train(tiny_recipe(), tmp_path / "run", compute=PLAIN, progress=lambda state: None, callbacks=[Watch()])
    assert Watch.seen == list(zip([1, 2, 3], summary.history["train"]["loss"], strict=True))


def test_numbers_of_a_callback_join_the_record_of_their_step(tmp_path):
    class Twice(Callback):
        def on_step(self, view):
            assert view.optimizer.param_groups and view.directory == tmp_path / "run"
            return {"twice": 2 * view.metrics["loss"]} if view.position.step != 2 else None

    train(tiny_recipe(), tmp_path / "run", compute=PLAIN, progress=lambda state: None, callbacks=[Twice()])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if line["kind"] == "train"}
    assert {step for step, line in steps.items() if "twice" in line} == {1, 3}
    assert steps[3]["twice"] == 2 * steps[3]["loss"]


# Choosing precision and compilation ---------------------------------------------------------------


def test_a_machine_without_a_compiler_trains_uncompiled_and_says_why(monkeypatch):
    def seconds(recipe, compute, device):
        if compute.compile:
            raise RuntimeError("no working C++ compiler\nlong story")
        return 1.0, 0.0

    monkeypatch.setattr(precision, "_seconds", seconds)
    recipe = load_recipe(tiny_recipe(compile="auto", budget={"steps": 1000}))
    choice = precision.measure_compute(recipe, CPU)
    assert choice.compute == Compute("fp32", False)
    assert choice.measured == {"fp32": 1.0, "compile_failed": "RuntimeError: no working C++ compiler"}


def test_what_the_recipe_fixes_is_not_measured(monkeypatch):
    monkeypatch.setattr(precision, "_seconds", lambda *given: pytest.fail("measured"))
    recipe = load_recipe(tiny_recipe(precision="bf16", compile=True))
    assert precision.measure_compute(recipe, CPU) == precision.Choice(Compute("bf16", True))


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(ConfigError, match="not supported by this GPU"):
        precision.measure_compute(load_recipe(tiny_recipe(precision="bf16")), torch.device("cuda"))


def test_measuring_is_real_and_leaves_no_trace():
    recipe = load_recipe(tiny_recipe(precision="auto", compile="auto"))
    before = torch.random.get_rng_state()
    choice = precision.measure_compute(recipe, CPU)
    assert set(choice.measured) == {"fp32", "bf16"} and all(value > 0 for value in choice.measured.values())
    assert not choice.compute.compile
    assert torch.equal(before, torch.random.get_rng_state())
