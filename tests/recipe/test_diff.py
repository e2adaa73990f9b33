"""Differences between recipes."""

from __future__ import annotations

import pytest

from torchstone.recipe.diff import differences
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe


def test_equal_recipes_do_not_differ(base: Recipe, base_yaml: str) -> None:
    assert differences(base, load_recipe(base_yaml)) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=3", [("seed", 0, 3)]),
        ("budget.steps=9", [("budget.tokens", 500000, None), ("budget.steps", None, 9)]),
        ("optimizer.betas.1=0.9", [("optimizer.betas", [0.9, 0.95], [0.9, 0.9])]),
        ("sinks=[wandb]", [("sinks", [], ["wandb"])]),
        ("data.options={a: 1}", [("data.options", {}, {"a": 1})]),
        ("model.block.mixer.position=t-still", [("model.block.mixer.position.kind", "t-wave", "t-still")]),
    ],
)
def test_each_difference_once(base: Recipe, override: str, expected: list[tuple]) -> None:
    changed = load_recipe(base, [override])
    assert [tuple(item) for item in differences(base, changed)] == expected
    assert [item.path for item in differences(changed, base)]


def test_entries_of_lists_of_parts_are_compared_one_by_one(base: Recipe) -> None:
    two = load_recipe(base, ["model.pattern=[t-alpha, t-beta]"])
    changed = load_recipe(two, ["model.pattern.1.version=v2"])
    assert [tuple(item) for item in differences(two, changed)] == [("model.pattern.1.version", "v1", "v2")]
    shorter = load_recipe(two, ["model.pattern=[t-alpha]"])
    assert [item.path for item in differences(two, shorter)] == ["model.pattern"]
