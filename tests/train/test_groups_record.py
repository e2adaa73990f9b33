"""Every run says which parameter it decays how strongly: in `run.json` and in `recipe show`."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_recipe

from torchstone.cli.recipe import cost
from torchstone.errors import CheckpointError, ConfigError, InterruptedRun
from torchstone.optim.adamw import AdamWConfig
from torchstone.recipe.load import load_recipe
from torchstone.train.budget import groups_of
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.precision import Compute
from torchstone.train.record import OPTIONAL, read_record
from torchstone.train.run import train
from torchstone.train.signals import Stop

BY_ROLE = "optimizer.weight_decay={default: 0.1, attention_qk: 0, mlp: 0.2}"


def test_the_record_of_a_run_lists_every_tensor_once(tmp_path):
    recipe = load_recipe(tiny_recipe(), [BY_ROLE])
    train(recipe, tmp_path / "run", progress=lambda state: None)
    groups = json.loads((tmp_path / "run" / "run.json").read_text())["groups"]
    assert groups == groups_of(recipe)
    assert {group["group"]: group["weight_decay"] for group in groups} == {
        "attention_qk": 0.0,
        "attention_vo": 0.1,
        "mlp": 0.2,
        "embeddings": 0.1,
        "no_decay": 0.0,
    }
    names = [name for group in groups for name in group["names"]]
    model = recipe.model.skeleton(recipe.data.vocabulary(), recipe.data.sequence_length())
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_the_cost_of_a_recipe_names_its_groups():
    shown = cost(load_recipe(tiny_recipe(), [BY_ROLE]))
    assert shown["optimizer group attention_qk"] == "weight decay 0 on 4,096 values (tensors: 4)"
    plain = cost(load_recipe(tiny_recipe()))
    assert plain["optimizer group decay"].startswith("weight decay 0.1 on ") and "optimizer group mlp" not in plain


def test_an_optimizer_without_decay_has_no_groups_to_list():
    class Bare(AdamWConfig):
        weight_decay: None = None  # type: ignore[assignment]

    recipe = load_recipe(tiny_recipe())
    assert groups_of(recipe.model_copy(update={"optimizer": Bare()})) == []


def go(directory, *overrides, until=None, allow=()):
    """Six steps; with `until`, a stop after that one."""
    stop = Stop()

    def watch(state):
        if state["step"] == until:
            stop.ask("the test")

    recipe = load_recipe(tiny_recipe(budget={"steps": 6}), overrides)
    return train(recipe, directory, compute=Compute("fp32", False), progress=watch, stop=stop, allow=allow)


def begun(directory, *overrides):
    with pytest.raises(InterruptedRun):
        go(directory, *overrides, until=3)
    return directory


@pytest.mark.parametrize("listed", [True, False], ids=["groups in the record", "record without groups"])
@pytest.mark.parametrize("before, after", [((), (BY_ROLE,)), ((BY_ROLE,), ("optimizer.weight_decay=0.1",))])
def test_decay_that_regroups_the_parameters_is_refused_before_anything_is_written(tmp_path, before, after, listed):
    run = begun(tmp_path / "run", *before)
    if not listed:
        forget_groups(run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"optimizer\.weight_decay puts the parameters into the groups .*attention_qk"
    ):
        go(run, *after, allow=["optimizer"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert go(run, *before).steps == 6  # the refusal did no harm


def test_decay_of_a_role_that_has_a_number_may_change(tmp_path):
    run = begun(tmp_path / "run", BY_ROLE)
    go(run, BY_ROLE, "optimizer.weight_decay.attention_qk=0.3", allow=["optimizer"])
    groups = {group["group"]: group["weight_decay"] for group in read_record(run).groups}
    assert groups["attention_qk"] == 0.3 and groups["mlp"] == 0.2
    (resumed,) = read_record(run).resumes
    assert resumed["recipe"] == ["optimizer.weight_decay.attention_qk was 0.0, now 0.3"]
    stored = CheckpointStore(run / "checkpoints").load().data["optimizer"]["param_groups"]
    assert 0.3 in [group["weight_decay"] for group in stored]


def forget_groups(run):
    """The record as versions wrote it that did not list the groups."""
    record = json.loads((run / "run.json").read_text())
    del record["groups"]
    (run / "run.json").write_text(json.dumps(record))


def test_records_of_versions_that_listed_no_groups_are_read_and_continued(tmp_path):
    run = begun(tmp_path / "run")
    forget_groups(run)
    assert read_record(run).groups == []
    assert go(run).steps == 6
    assert read_record(run).groups == groups_of(load_recipe(run / "recipe.yaml"))
    assert go(run).steps == 6  # a finished run is read again


def test_a_record_that_lacks_anything_else_is_damaged(tmp_path):
    run = begun(tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    for name in record.keys() - OPTIONAL.keys():
        (run / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != name}))
        with pytest.raises(CheckpointError, match="damaged"):
            read_record(run)
