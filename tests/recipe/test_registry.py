"""The registry of kinds and the catalogue that a person reads."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest

from torchstone.errors import ConfigError
from torchstone.kinds import KINDS
from torchstone.recipe import registry
from torchstone.recipe.catalogue import catalogue, family_named, render
from torchstone.recipe.part import Part
from torchstone.recipe.registry import kinds, parse_part, part_class, register


class Entry:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch):
    """Sets what the entry-point group holds."""

    def put(*entries: Entry) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else ())
        registry._third_party.cache_clear()

    yield put
    monkeypatch.undo()
    registry._third_party.cache_clear()


@pytest.mark.parametrize("family", sorted(KINDS))
def test_every_built_in_kind_exists_and_says_so_itself(family: str) -> None:
    for kind in KINDS[family]:
        cls = part_class(family, kind)
        assert issubclass(cls, Part)
        assert cls.model_fields["kind"].default == kind
        assert cls.family == family
        assert cls.__doc__, cls


@pytest.mark.parametrize("family", sorted(KINDS))
def test_the_catalogue_describes_every_setting(family: str) -> None:
    text = render(catalogue([family]))
    for kind in KINDS[family]:
        assert f"{family}: {kind}\n" in text + "\n"
        for name in part_class(family, kind).model_fields:
            assert name == "kind" or f"    {name} " in text


def test_third_parties_add_kinds(entry_points) -> None:
    entry_points(Entry("mixer.t-third", "torchstone.nn.attention.multihead:AttentionConfig"))
    assert "t-third" in kinds("mixer")
    assert part_class("mixer", "t-third").__name__ == "AttentionConfig"


def test_third_parties_cannot_replace_a_built_in_kind(entry_points) -> None:
    entry_points(Entry("mixer.attention", "evil:Config"))
    with pytest.raises(ConfigError, match="would replace a built-in kind"):
        kinds("mixer")


def test_a_kind_is_registered_once() -> None:
    class Config(Part):
        family: ClassVar[str] = "mixer"
        kind: Literal["attention"] = "attention"

    with pytest.raises(ConfigError, match="exists already"):
        register("mixer")(Config)


def test_families_and_kinds_are_named_when_unknown() -> None:
    with pytest.raises(ConfigError, match="there is no family 'mixr'"):
        kinds("mixr")
    with pytest.raises(ConfigError, match="Did you mean 't-alpha'"):
        part_class("mixer", "t-alpa")
    with pytest.raises(ConfigError, match="needs the key 'kind'"):
        parse_part("mixer", {"heads": 3})
    with pytest.raises(ConfigError, match="'t-wave' part is no mixer"):
        parse_part("mixer", parse_part("position", "t-wave"))


@pytest.mark.parametrize("kind", ["os:system", "torchstone.nn.attention.multihead:AttentionConfig", "../x", ""])
def test_a_recipe_cannot_name_a_python_path(kind: str) -> None:
    with pytest.raises(ConfigError, match="unknown mixer kind"):
        parse_part("mixer", kind)


def test_a_family_may_be_named_by_its_place() -> None:
    assert family_named("mixer") == "mixer"
    assert family_named("optimizer") == "optimizer"
    with pytest.raises(ConfigError, match="Did you mean mixer"):
        family_named("mixr")
    with pytest.raises(ConfigError, match="differential is a kind of mixer"):
        family_named("differential")
    with pytest.raises(ConfigError, match="there is no family"):
        family_named("model.nothing.here")


@pytest.mark.parametrize("kind", [["attention"], 3, None, {"kind": "attention"}])
def test_a_kind_that_is_no_text_is_refused(kind: object) -> None:
    with pytest.raises(ConfigError, match="which is no text; allowed kinds: attention"):
        parse_part("mixer", {"kind": kind})
