"""Every run says which parameter it decays how strongly: in `run.json` and in `recipe show`."""

from __future__ import annotations

import json

from tiny import tiny_recipe

from torchstone.cli.recipe import cost
from torchstone.optim.adamw import AdamWConfig
from torchstone.recipe.load import load_recipe
from torchstone.train.budget import groups_of
from torchstone.train.run import train

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
