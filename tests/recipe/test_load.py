"""Loading recipes: what is accepted, and what an error says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml, parse_yaml

finite = st.floats(min_value=1e-12, max_value=1e12, allow_subnormal=False)
counts = st.integers(1, 10**9)
positions = st.just({"kind": "t-still"}) | st.fixed_dictionaries({"kind": st.just("t-wave"), "base": finite})
alphas = st.fixed_dictionaries(
    {
        "kind": st.just("t-alpha"),
        "heads": st.none() | counts,
        "window": st.none() | counts,
        "position": positions,
        "dropout": st.floats(0, 1, exclude_max=True),
    }
)
betas = st.fixed_dictionaries(
    {
        "kind": st.just("t-beta"),
        "version": st.sampled_from(["v1", "v2"]),
        "lambda_init": st.just("schedule") | finite,
        "position": positions,
    }
)
mixers = st.sampled_from(["t-alpha", "t-beta"]) | alphas | betas
recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "kind": st.just("t-model"),
                "width": counts,
                "depth": counts,
                "pattern": st.lists(mixers, max_size=3),
                "block": st.fixed_dictionaries({"mixer": mixers, "extra": st.none() | mixers}),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "kind": st.just("t-data"),
                "paths": st.lists(st.text(max_size=20), max_size=3),
                "options": st.dictionaries(
                    st.text(max_size=5), st.none() | st.booleans() | counts | finite | st.text()
                ),
            }
        ),
        "objective": st.just("t-next"),
        "optimizer": st.fixed_dictionaries({"kind": st.just("t-opt"), "learning_rate": finite, "fused": st.booleans()}),
        "schedule": st.fixed_dictionaries({"kind": st.just("t-flat"), "warmup": finite}),
        "budget": st.fixed_dictionaries({"tokens": counts}) | st.fixed_dictionaries({"tokens_per_parameter": finite}),
        "precision": st.sampled_from(["auto", "fp32", "bf16"]),
        "compile": st.sampled_from(["auto", True, False]),
        "sinks": st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2),
        "seed": st.integers(0, 2**63),
    }
)


@given(recipes)
def test_recipe_to_yaml_to_recipe_loses_nothing(data: dict) -> None:
    recipe = load_recipe(data)
    text = dump_yaml(recipe)
    again = load_recipe(text)
    assert again == recipe
    assert again.data_dict() == recipe.data_dict()
    assert dump_yaml(again) == text
    assert type(again.model) is type(recipe.model)


def test_every_form_of_a_recipe_gives_the_same(base: Recipe, base_yaml: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(base_yaml)
    plain = parse_yaml(base_yaml).data
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe(plain) == load_recipe(base) == base


def test_plain_data_given_by_the_caller_is_not_changed(base_yaml: str) -> None:
    plain = parse_yaml(base_yaml).data
    load_recipe(plain, ["model.block.mixer=t-beta", "optimizer.betas.0=0.5"])
    assert plain == parse_yaml(base_yaml).data


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "width: 64",
            "widht: 64",
            [
                ":3:3: ",
                "unknown key model.widht",
                "allowed keys of model: kind, width",
                "Did you mean model.width?",
                "1 more to mend: model.width",
            ],
        ),
        (
            "heads: 8",
            "haeds: 8",
            [
                ":5:28: ",
                "unknown key model.block.mixer.haeds",
                "kind, heads, window",
                "Did you mean model.block.mixer.heads?",
            ],
        ),
        ("base: 500", "base: -500", [":5:", "model.block.mixer.position.base", "-500", "number > 0"]),
        (
            "kind: t-alpha",
            "kind: t-alhpa",
            [":5:5: ", "unknown mixer kind 't-alhpa'", "Did you mean 't-alpha'?"],
        ),
        ("width: 64", "width: true", ["model.width", "not true or false"]),
        ("width: 64", "width: sixty", ["model.width cannot be 'sixty'", "integer > 0"]),
        ("tokens: 500000", "tokens: 500000, steps: 3", [":10:1: ", "exactly one of", "given: tokens, steps"]),
        ("budget: {tokens: 500000}\n", "", ["budget is missing"]),
        ("data: t-data", "data: 3", [":6:1: ", "data", "3 was given", "Kinds: "]),
        ("data: t-data", "learning_rate: 3", ["learning_rate", "Did you mean optimizer.learning_rate?"]),
        (
            "optimizer: {kind: t-opt}",
            "optimizer: {kind: t-opt, lr: 1}",
            ["Did you mean optimizer.learning_rate?"],
        ),
        (
            "schedule: t-flat",
            "schedule: t-flat\nprecision: half",
            ["precision cannot be 'half'", "'auto' or 'fp32'"],
        ),
    ],
)
def test_an_error_names_place_given_allowed_and_nearest(
    base_yaml: str, before: str, after: str, words: list[str]
) -> None:
    assert before in base_yaml
    with pytest.raises(ConfigError) as caught:
        load_recipe(base_yaml.replace(before, after))
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


def test_a_problem_that_an_override_brings_is_not_blamed_on_the_file(base_yaml: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(base_yaml, ["model.width=0"])
    assert ":3:" not in str(caught.value)
    assert "model.width cannot be 0" in str(caught.value)


def test_an_override_can_complete_or_mend_a_recipe(base_yaml: str) -> None:
    incomplete = base_yaml.replace("budget: {tokens: 500000}\n", "").replace("width: 64", "width: -1")
    assert load_recipe(incomplete, ["budget.steps=7", "model.width=32"]).budget.steps == 7


@pytest.mark.parametrize("text", ["\n", "a\nb\n", "[1]\n", "3\n\n"])
def test_a_recipe_is_a_mapping(text: str) -> None:
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        load_recipe(text)


def test_paths_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"Did you mean .*tiny\.yaml"):
        load_recipe(tmp_path / "tny.yaml")
    with pytest.raises(ConfigError, match=r"Recipes beside it: tiny\.yaml"):
        load_recipe(tmp_path / "something-else.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_recipe(str(tmp_path / ("x" * 5000)))
    with pytest.raises(ConfigError, match="cannot read"):
        load_recipe("nul\0.yaml")
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_recipe(tmp_path / "dangling.yaml")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_recipe(path)


def test_a_run_directory_points_to_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"Did you mean .*recipe\.yaml"):
        load_recipe(tmp_path)


def test_a_recipe_cannot_be_changed(base: Recipe) -> None:
    with pytest.raises(ValueError, match="frozen"):
        base.seed = 3  # type: ignore[misc]
