"""`data_phases` of a recipe: what it may say, the data of each stage, exact resume around a border, and larger budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_recipe

import torchstone
from torchstone.errors import ConfigError, DataError, InterruptedRun, StudyError
from torchstone.lab.study import Arm, Cell, Scale
from torchstone.lab.training import Trained
from torchstone.recipe.diff import differences
from torchstone.recipe.fingerprint import recipe_fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.studies import _jetmoe_phases as study
from torchstone.train.budget import data_of, phases_of
from torchstone.train.distributed import World
from torchstone.train.growth import AppendTokens, grow_run
from torchstone.train.precision import measure_compute
from torchstone.train.run import load_run, train
from torchstone.train.signals import Stop

ROOT = Path(__file__).resolve().parents[2]
WSD = {"kind": "wsd", "warmup": 2, "decay": 4}
PHASES = {"decay": [0.25, 0.75]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path):
    """A mixture of two small texts with shared ids."""
    sources = []
    for name in ("broad", "target"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {n}: {n} is {n + n}."}) + "\n" for n in range(300)))
        corpus = {"kind": "files", "paths": str(path)}
        sources.append({"kind": "text", "corpus": corpus, "tokenizer": "bytes", "length": 16})
    return {"kind": "mixture", "sources": sources, "shares": [0.75, 0.25], "token_ids": "shared"}


@pytest.fixture
def recipe(texts):
    """Plain data of ten steps of four rows in phases: recipe(key=value)."""

    def make(**changes):
        given = {"data": texts, "data_phases": PHASES, "schedule": WSD, "budget": {"steps": 10}}
        return tiny_recipe(**{**given, **changes})

    return make


def run(directory, recipe, **options):
    return train(recipe, directory, progress=lambda state: None, **options)


def stop_after(step):
    """Options that stop a run after `step` steps."""
    stop = Stop()
    return {"stop": stop, "progress": lambda state: stop.ask("the test") if state["step"] == step else None}


def weights(directory):
    return load_run(directory)[1].state_dict()


def test_the_example_of_the_guide_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    broad, target = tmp_path / "broad.jsonl", tmp_path / "target.jsonl"
    for path in (broad, target):
        path.write_text("".join(json.dumps({"text": f"{path.stem} {n}: {n} is {n + n}."}) + "\n" for n in range(2000)))
    # start: recipe
    text = "kind: text, tokenizer: bytes, length: 64"
    recipe = torchstone.load_recipe(
        "recipes/tiny.yaml",
        [
            f"data={{kind: mixture, token_ids: shared, shares: [0.875, 0.125], sources: ["
            f"{{{text}, corpus: {{kind: files, paths: {broad}}}}}, "
            f"{{{text}, corpus: {{kind: files, paths: {target}}}}}]}}",
            "schedule={kind: wsd, decay: 0.2}",
            "data_phases={warmup: [1, 0], stable: [1, 0], decay: [0.375, 0.625]}",
            "budget.steps=20",
            "evaluation.sequences=16",
        ],
    )
    # end: recipe
    small = torchstone.load_recipe(recipe, ["model.width=16", "model.depth=1", "precision=fp32", "compile=false"])
    run(tmp_path / "run", small)
    # start: rows
    recipe, model, data = load_run(tmp_path / "run")
    assert data.timetable(16).before(20) == (280, 40)  # rows of each source in 20 steps: 12.5 % target
    outputs = [recipe.objective.build()(model, batch) for batch in data.part(1).evaluation(16, 32)]
    loss = sum(output.loss_sum for output in outputs) / sum(output.count for output in outputs)  # held-out target alone
    # end: rows
    assert 2 < float(loss.detach()) < 7


# The recipe ---------------------------------------------------------------------------------------


def test_phases_follow_the_stages_of_the_schedule(recipe):
    found = [(phase.name, phase.begin, phase.shares) for phase in phases_of(load_recipe(recipe()))]
    own = (0.75, 0.25)
    assert found == [("warmup", 0, own), ("stable", 2, own), ("decay", 6, (0.25, 0.75))]
    linear = load_recipe(recipe(schedule={"kind": "linear", "warmup": 0.5}))
    assert [(phase.name, phase.begin) for phase in phases_of(linear)] == [("warmup", 0), ("decay", 5)]
    assert phases_of(load_recipe(recipe(data_phases={}))) == ()
    table = data_of(load_recipe(recipe())).timetable(4)
    assert [table.counts(step) for step in (0, 5, 6, 9)] == [(3, 1), (3, 1), (1, 3), (1, 3)]
    assert table.before(10) == (22, 18)


def test_recipes_round_trip_and_take_overrides(recipe):
    first = load_recipe(recipe())
    assert load_recipe(dump_yaml(first)) == first
    moved = load_recipe(first, ["data_phases.decay=[0.5, 0.5]", "data_phases.stable=[1, 0]"])
    assert moved.data_phases == {"decay": (0.5, 0.5), "stable": (1.0, 0.0)}
    assert load_recipe(first, ["data_phases.decay.0=0.5", "data_phases.decay.1=0.5"]).data_phases["decay"] == (0.5, 0.5)
    assert [change.path for change in differences(first, load_recipe(first, ["data_phases={}"]))] == ["data_phases"]
    assert recipe_fingerprint(moved) != recipe_fingerprint(first)


def test_what_a_recipe_may_not_say(recipe):
    for changes, words in (
        ({"data_phases": {"decay": [0.2, 0.7]}}, r"data_phases: stage decay: .*\[0.2, 0.7\], which add up to 0.9"),
        ({"data_phases": {"decay": [1.0]}}, "2 sources have the shares"),
        ({"data_phases": {"decay": [0.5, "x"]}}, "data_phases"),
        (
            {"data": {"kind": "recall", "cells": 8}},
            "data is of the kind recall.*data.kind mixture, or leave data_phases empty",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            load_recipe(recipe(**changes))


def test_what_does_not_fit_the_run_is_refused_before_anything_is_written(recipe, tmp_path):
    absent = {name: [1, 0] for name in ("warmup", "stable", "decay")}
    for changes, error, words in (
        ({"data_phases": {"cooldown": [1, 0]}}, ConfigError, "'cooldown'.*schedule .wsd.*warmup, stable, decay"),
        ({"schedule": {"kind": "constant", "warmup": 0}}, ConfigError, "'decay'.*its stages: stable"),
        ({"data_phases": absent}, ConfigError, "source 1 .* absent from all stages"),
        ({"data_phases": {"decay": [0.99, 0.01]}}, DataError, "without a row in the stage decay"),
        ({"schedule": {**WSD, "decay": 9}}, ConfigError, "2 steps of warmup and 9 steps of decay .* run of 10 steps"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            run(tmp_path / "run", recipe(**changes))
        assert not (tmp_path / "run").exists()


# The run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 5, 6, 7, 9])
def test_an_interrupted_run_ends_bitwise_as_a_straight_one(recipe, tmp_path, at):
    """Stops before, at and behind the first step of the decay (step 6), and in warmup."""
    straight = run(tmp_path / "straight", recipe())
    with pytest.raises(InterruptedRun, match=f"after step {at} of 10"):
        train(recipe(), tmp_path / "run", **stop_after(at))
    resumed = run(tmp_path / "run", recipe())
    assert resumed.history["train"]["loss"] == straight.history["train"]["loss"]
    assert resumed.history["validation"]["loss"] == straight.history["validation"]["loss"]
    assert resumed.taints == ()
    expected = weights(tmp_path / "straight")
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "run").items())


def test_phases_change_the_data_from_their_stage_on_and_the_held_out_rows_never(recipe, tmp_path):
    phased, plain = (
        run(tmp_path / name, recipe(data_phases=phases, evaluation={"every": 1, "sequences": 8}))
        for name, phases in (("phased", PHASES), ("plain", {}))
    )
    assert phased.history["train"]["loss"][:6] == plain.history["train"]["loss"][:6]
    assert phased.history["train"]["loss"][6] != plain.history["train"]["loss"][6]
    assert phased.history["validation"]["loss"][:6] == plain.history["validation"]["loss"][:6]


def test_accumulation_sees_the_same_rows(recipe, tmp_path):
    whole = run(tmp_path / "whole", recipe())
    parts = run(tmp_path / "parts", recipe(batch={"sequences": 4, "micro": 1}))
    assert parts.history["train"]["loss"] == pytest.approx(whole.history["train"]["loss"], rel=2e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_together_see_the_rows_of_one(recipe, size):
    data = data_of(load_recipe(recipe(batch={"sequences": 12})))
    for step in range(4, 9):
        whole = data.batch(0, step, 12)
        ranks = [World(rank, size, torch.device("cpu")).rows(12) for rank in range(size)]
        parts = [data.batch(0, step, 12, *rows) for rows in ranks]
        assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
        assert sum((part.rows for part in parts), ()) == whole.rows


def test_a_loaded_run_has_its_phases(recipe, tmp_path):
    run(tmp_path / "run", recipe())
    loaded, _, data = load_run(tmp_path / "run")
    assert data.timetable(4).before(10) == (22, 18)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"] == data.fingerprint
    assert data.fingerprint != data_of(load_recipe(loaded, ["data_phases={}"])).fingerprint


# Budgets and other changes on resume --------------------------------------------------------------


def test_a_larger_budget_continues_a_run_whose_decay_is_still_to_come(recipe, tmp_path):
    with pytest.raises(InterruptedRun):
        train(recipe(), tmp_path / "run", **stop_after(6))
    longer = run(tmp_path / "run", recipe(budget={"steps": 12}))
    straight = run(tmp_path / "straight", recipe(budget={"steps": 12}))
    assert longer.history["train"]["loss"] == straight.history["train"]["loss"]


def test_a_budget_that_moves_a_decay_that_has_begun_is_refused(recipe, tmp_path):
    run(tmp_path / "run", recipe())
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    words = r"has done 10 steps, and step 6 was in the stage decay with .*\[0.25, 0.75\].*would be in stable with"
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "run", recipe(budget={"steps": 12}))
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    slower = recipe(budget={"steps": 12}, schedule={**WSD, "decay": 6})  # the same data, other rates
    with pytest.raises(ConfigError, match="under another plan: step 6, which is done"):
        run(tmp_path / "run", slower)
    assert run(tmp_path / "run", slower, allow=["schedule"]).steps == 12


def test_a_budget_that_adds_a_stage_is_refused(recipe, tmp_path):
    """With a stable stage the sources are read in other blocks, which would give generated tasks other rows."""
    changes = {"data_phases": {"warmup": [0.5, 0.5], **PHASES}, "schedule": {**WSD, "decay": 8}}
    with pytest.raises(InterruptedRun):
        train(recipe(**changes), tmp_path / "run", **stop_after(1))
    with pytest.raises(
        ConfigError, match="stages decay, warmup, and this budget and schedule have decay, stable, warmup"
    ):
        run(tmp_path / "run", recipe(**changes, budget={"steps": 12}))


def test_other_phases_are_another_run(recipe, tmp_path):
    with pytest.raises(InterruptedRun):
        train(recipe(), tmp_path / "run", **stop_after(1))
    with pytest.raises(ConfigError, match="started with another recipe: data_phases.decay was"):
        run(tmp_path / "run", recipe(data_phases={"decay": [0.5, 0.5]}))


# The arms of the study ----------------------------------------------------------------------------


def arms(scale):
    recipes = {"": load_recipe(tiny_recipe())}
    for variant in study.variants(Scale(1, study.SETTINGS[scale])):
        recipes[variant.name] = load_recipe(recipes[variant.against], variant.overrides)
    return {name: recipe for name, recipe in recipes.items() if name}


@pytest.mark.parametrize("scale", ["smoke", "toy", "gpu"])
def test_every_arm_has_the_same_rows_of_target_text(scale, texts):
    for name, found in arms(scale).items():
        small = load_recipe(found, [f"data.sources={json.dumps(texts['sources'])}"])
        rows, steps = found.batch.sequences, found.budget.steps
        assert data_of(small).timetable(rows).before(steps) == (0.95 * rows * steps, 0.05 * rows * steps), name
    assert list(arms(scale)) == [study.UNIFORM, study.DECAY, study.COSINE]


def test_the_study_counts_rows_and_refuses_unequal_ones(recipe, tmp_path):
    summary = run(tmp_path / "run", recipe())
    cell = Cell(Arm("phases.decay"), 0, "toy", {"phases_windows": 4}, tmp_path)
    trained = Trained(cell, *load_run(tmp_path / "run"), summary)
    with pytest.raises(StudyError, match="had 18 rows of target text in 10 steps of 4 rows, not 5 %"):
        study.probe(trained)


@settings(max_examples=20, deadline=None)
@given(steps=st.integers(10, 400), warmup=st.integers(0, 4), decay=st.integers(1, 5))
def test_phases_cover_the_run_and_begin_with_their_stages(steps, warmup, decay):
    data = {"kind": "mixture", "sources": [{"kind": "recall", "cells": 16}, {"kind": "gap-recall", "cells": 16}]}
    schedule = {"kind": "wsd", "warmup": warmup, "decay": decay}
    given = tiny_recipe(data=data, data_phases=PHASES, schedule=schedule, budget={"steps": steps})
    phases = phases_of(load_recipe(given))
    assert phases[0].begin == 0 and phases[-1].begin == steps - decay
    assert [phase.shares for phase in phases[:-1]] == [(0.5, 0.5)] * (len(phases) - 1)


# Growth and timing --------------------------------------------------------------------------------


def test_a_run_in_phases_grows_and_keeps_them(recipe, tmp_path):
    block = {"mixer": "attention", "feedforward": "pattention", "projection": "pattention"}
    given = recipe(model={**tiny_recipe()["model"], "block": block})
    with pytest.raises(InterruptedRun):
        train(given, tmp_path / "small", **stop_after(5))
    grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2))
    small, grown = (run(tmp_path / name, tmp_path / name / "recipe.yaml") for name in ("small", "grown"))
    before, after = small.history["train"], grown.history["train"]
    assert after["steps"] == [6, 7, 8, 9, 10] and grown.taints == ()
    assert after["loss"][0] == pytest.approx(before["loss"][5], abs=1e-5)  # the same rows, the same function
    assert phases_of(load_recipe(tmp_path / "grown" / "recipe.yaml")) == phases_of(load_recipe(given))


def test_growth_with_an_end_that_would_have_given_other_data_is_refused(recipe, tmp_path):
    block = {"mixer": "attention", "feedforward": "pattention", "projection": "pattention"}
    given = recipe(model={**tiny_recipe()["model"], "block": block})
    with pytest.raises(InterruptedRun):
        train(given, tmp_path / "small", **stop_after(5))
    with pytest.raises(ConfigError, match="the run has done 5 steps, and step 4 was in the stage stable"):
        grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2), until=8)
    assert not (tmp_path / "grown").exists()
    grow_run(tmp_path / "small", tmp_path / "grown", AppendTokens(2), until=12)
    assert run(tmp_path / "grown", tmp_path / "grown" / "recipe.yaml").steps == 12


def test_precision_is_measured_on_rows_of_the_phases(recipe, texts):
    """The mixture's own shares would not fill a batch of four rows; those of the stages do."""
    phases = {name: [0.5, 0.5] for name in ("warmup", "stable", "decay")}
    given = load_recipe(recipe(data={**texts, "shares": [0.99, 0.01]}, data_phases=phases, precision="auto"))
    assert measure_compute(given, torch.device("cpu")).measured.keys() >= {"fp32", "bf16"}
