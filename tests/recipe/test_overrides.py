"""Dotted overrides: what they set, what carries over, what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.errors import ConfigError
from torchstone.recipe.diff import differences
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe

MIXER = "model.block.mixer"


def changes(base: Recipe, *overrides: str) -> dict[str, tuple]:
    return {path: (before, after) for path, before, after in differences(base, load_recipe(base, overrides))}


@pytest.mark.parametrize(
    "override",
    [
        f"{MIXER}=t-beta",
        f"{MIXER}.kind=t-beta",
        f"{MIXER}={{kind: t-beta}}",
        "model.block={mixer: t-beta}",
        "model={block: {mixer: {kind: t-beta}}}",
    ],
)
def test_switching_a_kind_keeps_shared_settings(base: Recipe, override: str) -> None:
    recipe = load_recipe(base, [override])
    mixer = recipe.model.block.mixer
    assert (mixer.kind, mixer.heads, mixer.position.kind, mixer.position.base) == ("t-beta", 4, "t-wave", 500)
    assert changes(base, override) == {f"{MIXER}.kind": ("t-alpha", "t-beta"), f"{MIXER}.heads": (8, 4)}


def test_settings_beside_a_kind_win_over_what_carries_over(base: Recipe) -> None:
    found = changes(base, f"{MIXER}={{kind: t-beta, version: v2, heads: 8, position: t-still}}")
    assert found == {
        f"{MIXER}.kind": ("t-alpha", "t-beta"),
        f"{MIXER}.version": (None, "v2"),
        f"{MIXER}.position.kind": ("t-wave", "t-still"),
    }


def test_what_carries_over_does_not_depend_on_what_the_file_spells_out(base_yaml: str) -> None:
    short = load_recipe(base_yaml)
    complete = load_recipe(short.data_dict())
    override = [f"{MIXER}=t-beta"]
    assert load_recipe(base_yaml, override) == load_recipe(short, override) == load_recipe(complete, override)


def test_the_same_kind_keeps_everything(base: Recipe) -> None:
    assert changes(base, f"{MIXER}=t-alpha") == {}
    assert changes(base, f"{MIXER}={{window: 16}}") == {f"{MIXER}.window": (None, 16)}


def test_overrides_apply_from_left_to_right(base: Recipe) -> None:
    there_and_back = [f"{MIXER}=t-beta", f"{MIXER}.version=v2", f"{MIXER}=t-alpha"]
    assert load_recipe(base, there_and_back).model.block.mixer.heads == 4
    assert load_recipe(base, ["seed=1", "seed=2"]).seed == 2
    with pytest.raises(ConfigError, match=r"unknown key model\.block\.mixer\.version"):
        load_recipe(base, [f"{MIXER}.version=v2", f"{MIXER}=t-beta"])


@pytest.mark.parametrize("unit", ["steps=100", "flops=1e12", "tokens=5", "tokens_per_parameter=20"])
def test_a_budget_in_another_unit_replaces_the_one_before(base: Recipe, unit: str) -> None:
    name, value = unit.split("=")
    for override in (f"budget.{unit}", f"budget={{{name}: {value}}}"):
        budget = load_recipe(base, ["budget.steps=7", override]).budget
        assert budget.unit == name
        assert getattr(budget, name) == float(value)


def test_two_budgets_at_once_are_refused(base: Recipe) -> None:
    with pytest.raises(ConfigError, match="exactly one of"):
        load_recipe(base, ["budget={steps: 3, tokens: 4}"])


def test_lists_by_index_and_whole(base: Recipe) -> None:
    assert load_recipe(base, ["optimizer.betas.0=0.8"]).optimizer.betas == (0.8, 0.95)
    assert load_recipe(base, ["optimizer.betas=[0.5, 0.6]"]).optimizer.betas == (0.5, 0.6)
    grown = load_recipe(base, ["model.pattern.0.kind=t-beta", "model.pattern.1=t-alpha", "model.pattern.1.heads=3"])
    assert [mixer.kind for mixer in grown.model.pattern] == ["t-beta", "t-alpha"]
    assert grown.model.pattern[1].heads == 3
    switched = load_recipe(grown, ["model.pattern.1.kind=t-beta", "model.pattern.1.version=v2"])
    assert (switched.model.pattern[1].kind, switched.model.pattern[1].heads) == ("t-beta", 1)


def test_values_are_yaml(base: Recipe) -> None:
    recipe = load_recipe(
        base,
        [
            "optimizer.learning_rate=3e-4",
            "batch.micro=null",
            "compile=false",
            "data.paths=[a, 'b,c']",
            "data.options={x: {y: [1, on]}}",
            "sinks=[tensorboard]",
        ],
    )
    assert recipe.optimizer.learning_rate == 3e-4
    assert recipe.compile is False
    assert recipe.data.paths == ("a", "b,c")
    assert recipe.data.options == {"x": {"y": [1, "on"]}}
    assert recipe.sinks == ("tensorboard",)


def test_a_glob_is_text_without_quotes(base: Recipe) -> None:
    assert load_recipe(base, ["data.paths.0=*.jsonl"]).data.paths == ("*.jsonl",)


def test_an_absent_section_and_a_kind_given_alone_can_be_stepped_into(base_yaml: str) -> None:
    recipe = load_recipe(base_yaml, ["batch.micro=4", "schedule.warmup=10", "data.options.deep=1"])
    assert (recipe.batch.micro, recipe.batch.sequences, recipe.schedule.warmup) == (4, 32, 10)
    assert recipe.data.options == {"deep": 1}


def test_a_part_that_may_be_null(base: Recipe) -> None:
    with_extra = load_recipe(base, ["model.block.extra=t-beta", "model.block.extra.version=v2"])
    assert with_extra.model.block.extra.version == "v2"
    assert load_recipe(with_extra, ["model.block.extra=null"]) == base


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.block.mixr=t-beta", ["unknown key model.block.mixr", "Did you mean model.block.mixer?"]),
        (
            f"{MIXER}.hedas=3",
            [f"unknown key {MIXER}.hedas", "kind, heads, window", f"Did you mean {MIXER}.heads?"],
        ),
        (f"{MIXER}={{hedas: 3}}", [f"unknown key {MIXER}.hedas"]),
        (f"{MIXER}.position.bass=3", [f"Did you mean {MIXER}.position.base?"]),
        (f"{MIXER}=t-bate", [f"{MIXER}: unknown mixer kind 't-bate'", "Did you mean 't-beta'?"]),
        (f"{MIXER}=7", [MIXER, "7 was given"]),
        ("model.pattern.0=t-bate", ["model.pattern.0: unknown mixer kind", "Did you mean 't-beta'?"]),
        ("learning_rate=1", ["unknown key learning_rate", "Did you mean optimizer.learning_rate?"]),
        ("seed.x=3", ["cannot set seed.x", "seed is 0"]),
        ("model.pattern.3=t-beta", ["cannot set model.pattern.3", "list of 0"]),
        ("model.pattern.first=t-beta", ["model.pattern is a list"]),
        ("model.block.extra.heads=3", ["model.block.extra is null"]),
        ("seed", ["no override", "key=value"]),
        ("=3", ["no override"]),
        ("a..b=3", ["no override"]),
        ("__class__.x=3", ["unknown key __class__"]),
        ("seed=[1", ["override seed:1:", "not valid YAML"]),
        ("seed=!!python/object:x y", ["tag"]),
        ("optimizer.learning_rate=.inf", ["not a finite number"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate cannot be 'nan'"]),
        ("model.depth=true", ["model.depth", "not true or false"]),
    ],
)
def test_refused_overrides(base: Recipe, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(base, [override])
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


KEYS = st.sampled_from(
    [
        "model",
        "block",
        "mixer",
        "position",
        "kind",
        "base",
        "pattern",
        "0",
        "1",
        "budget",
        "tokens",
        "data",
        "options",
        "paths",
        "x",
        "seed",
        "optimizer",
        "betas",
    ]
)
VALUES = st.sampled_from(
    [
        "t-alpha",
        "t-beta",
        "t-wave",
        "null",
        "true",
        "3",
        "[1, 2]",
        "{kind: t-beta}",
        "{a: 1}",
        "x",
        "",
        "[t-alpha]",
        "{x: {y: z}}",
        "-1",
        "[",
        "1e400",
    ]
)


@given(st.lists(st.tuples(st.lists(KEYS, min_size=1, max_size=5), VALUES), min_size=1, max_size=3))
def test_any_override_gives_a_recipe_or_a_typed_error(parts: list[tuple[list[str], str]]) -> None:
    text = "model: {kind: t-model, width: 8}\ndata: t-data\nobjective: t-next\noptimizer: t-opt\n"
    text += "schedule: t-flat\nbudget: {steps: 3}\n"
    try:
        load_recipe(text, [f"{'.'.join(keys)}={value}" for keys, value in parts])
    except ConfigError as error:
        assert "\n" not in str(error)


POSITION = "model.block.mixer.position"
FULL = {"kind": "attention", "position": {"kind": "rotary", "variant": "full", "p": 1.0}}


def test_a_rotary_variant_and_its_share_come_in_either_order() -> None:
    whole = load_recipe({"model": {"kind": "decoder"}, "data": "recall", "budget": {"steps": 3}})
    spelled = load_recipe(
        {"model": {"kind": "decoder", "block": {"mixer": FULL}}, "data": "recall", "budget": {"steps": 3}}
    )
    assert whole == spelled
    for start in (whole, spelled):
        share, variant = f"{POSITION}.p=0.75", f"{POSITION}.variant=p"
        assert load_recipe(start, [share, variant]) == load_recipe(start, [variant, share])
        with pytest.raises(ConfigError, match=r"variant p turns a share .* give p"):
            load_recipe(start, [variant])  # 1 of the full rotation does not carry over
