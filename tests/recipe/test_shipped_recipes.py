"""The recipes that come with the project: they load, and every key stands there with a true comment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from torchstone.recipe.load import load_recipe
from torchstone.recipe.registry import kinds
from torchstone.recipe.structure import REQUIRED, Slot, default_of, field_slot, slot_class
from torchstone.recipe.yaml import Document, KeyPath, parse_yaml, read_yaml

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
BUDGETS = {"tokens", "flops", "steps", "tokens_per_parameter"}


def fields_of(model: BaseModel, path: KeyPath = ()) -> list[tuple[KeyPath, type[BaseModel], str]]:
    """Every setting of a resolved recipe: key path, the class that has it, its name."""
    found = []
    for name in type(model).model_fields:
        found.append(((*path, name), type(model), name))
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            found += fields_of(value, (*path, name))
    return found


@pytest.fixture(params=RECIPES, ids=lambda path: path.name)
def shipped(request: pytest.FixtureRequest) -> tuple[Path, Document, dict[KeyPath, str]]:
    """Path, parsed text, and for each key the comment on its line. A part and its kind share theirs."""
    document = read_yaml(request.param)
    lines = request.param.read_text(encoding="utf-8").splitlines()
    comments = {}
    for path, (line, _) in document.places.items():
        comments[path] = lines[line - 1].partition("#")[2].strip()
    for path in [path for path in comments if path[-1:] == ("kind",)]:
        comments[path] = comments[path[:-1]] = f"{comments[path[:-1]]} {comments[path]}".strip()
    return request.param, document, comments


def test_there_are_recipes_for_a_laptop_and_a_gpu() -> None:
    assert {"tiny.yaml", "small.yaml"} <= {path.name for path in RECIPES}


def test_every_setting_is_spelled_out_with_a_comment(shipped) -> None:
    path, document, comments = shipped
    missing, bare = [], []
    for key, _, name in fields_of(load_recipe(path)):
        if key not in document.places:
            if not (key[0] == "budget" and name in BUDGETS):
                missing.append(key)
        elif not comments[key] and not _explained_inside(key, comments):
            bare.append(key)
    assert missing == []
    assert bare == []


def _explained_inside(key: KeyPath, comments: dict[KeyPath, str]) -> bool:
    """A mapping needs no comment of its own if every key directly inside has one."""
    inside = [text for path, text in comments.items() if path[:-1] == key and path != key]
    return bool(inside) and all(inside)


def test_defaults_and_kinds_in_comments_are_true(shipped) -> None:
    path, _, comments = shipped
    checked = 0
    for key, cls, name in fields_of(load_recipe(path)):
        comment = comments.get(key, "")
        stated = re.search(r"default (.+?)\.(?:\s|$)", comment)
        if stated:
            checked += 1
            default = default_of(cls, name)
            assert default is not REQUIRED, key
            assert parse_yaml(stated[1]).data == default, (key, stated[1], default)
        listed = re.search(r"Kinds: ([^.]*)\.", comment)
        if listed and name != "kind":
            family = field_slot(cls, name).family
            assert family is not None
            named = {re.sub(r" \(.*?\)", "", word).strip() for word in re.split(r",(?![^(]*\))", listed[1])}
            assert named == set(kinds(family)) - {kind for kind in kinds(family) if kind.startswith("t-")}, key
    assert checked > 30


def test_every_kind_is_listed_somewhere(shipped) -> None:
    path, _, comments = shipped
    data: Any = load_recipe(path)
    for key, cls, name in fields_of(data):
        if field_slot(cls, name).family is not None:
            assert "Kinds: " in comments[key], key


def test_the_model_can_be_counted(shipped) -> None:
    from torchstone.models.counts import count

    recipe = load_recipe(shipped[0])
    counts = count(recipe.model, recipe.data.vocabulary(), recipe.data.sequence_length())
    low, high = {"tiny.yaml": (2e5, 2e6), "small.yaml": (7e7, 1.6e8)}.get(shipped[0].name, (0, 1e12))
    assert low < counts.parameters < high


def test_slots_of_the_whole_schema_resolve() -> None:
    assert slot_class(Slot(family="model"), "decoder") is not None
