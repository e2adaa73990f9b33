"""Dotted overrides: `key=value` on the command line, and the arms of a comparison.

    optimizer.learning_rate=3e-4                      one setting
    model.block.mixer=differential                    another kind; settings that both kinds have carry over
    model.block.mixer={kind: differential, version: v2}
    model.pattern.0.window=64                         an entry of a list, from 0; the next free index appends
    budget.steps=100                                  another unit replaces the one before it

Values are YAML (`null`, `true`, `3e-4`, `[a, b]`, `{a: 1}`), read by the same strict reader as recipes. A
value that starts with `*`, `@`, `%` or a backtick, which YAML reserves, is text. Overrides apply from left to
right. A mapping given for a section or part sets the keys that it names and keeps the rest; a number that stands
for a section is spelled out first, so that `optimizer.weight_decay.attention_qk=0` leaves the other roles theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from torchstone.errors import ConfigError
from torchstone.recipe.part import plain
from torchstone.recipe.problems import config_error, dotted, shown, unknown_key
from torchstone.recipe.registry import parse_part, part_class
from torchstone.recipe.schema import Recipe, Section
from torchstone.recipe.structure import REQUIRED, Slot, default_of, field_slot, slot_class
from torchstone.recipe.yaml import KeyPath, parse_yaml

ROOT = Slot(section=Recipe)
_ABSENT = object()


def split_override(override: str) -> tuple[KeyPath, Any]:
    """Key path and value of one `key=value`; raises ConfigError if it is none, or the value is not valid
    YAML."""
    key, equals, text = override.partition("=")
    steps = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z0-9_-]+", step) for step in steps):
        raise ConfigError(
            f"{shown(override)} is no override; write key=value with a dotted key, for example "
            f"optimizer.learning_rate=3e-4."
        )
    text = text.strip()
    value = text if text.startswith(("*", "@", "%", "`")) else parse_yaml(text, f"override {key.strip()}").data
    return tuple(int(step) if step.isdigit() else step for step in steps), value


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[KeyPath]]:
    """Plain data of a recipe after overrides, and the key paths that they set.

    Args:
        data: plain data of a recipe (not changed); it may be incomplete.
        overrides: `key=value` texts, applied from left to right.

    Raises:
        ConfigError: an override is malformed, names an unknown key or kind, or steps into a plain value.
    """
    result: Any = plain(data)
    paths: list[KeyPath] = []
    for override in overrides:
        path, value = split_override(override)
        result = _Change(path, result).put(ROOT, result, 0, value)
        paths.append(path)
    return result, paths


class _Change:
    """One override on its way down the recipe: `path` is the whole key path, `data` the whole recipe for
    hints."""

    def __init__(self, path: KeyPath, data: Any) -> None:
        self.path, self.data = path, data

    def put(self, slot: Slot, data: Any, depth: int, value: Any) -> Any:
        """Plain data at `slot` after the value is set `depth` keys down the path."""
        if depth == len(self.path):
            return self.assign(slot, data, value)
        if slot.item is not None or (slot.family is None and slot.section is None):
            return self.put_plain(slot, data, depth, value)
        if slot.family is not None and data is not _ABSENT and isinstance(data, str):
            data = {"kind": data}
        if slot.family is not None and self.path[depth] == "kind" and depth == len(self.path) - 1:
            return self.assign(slot, data, value)
        present = _opened(slot, data)
        cls = slot_class(slot, present)
        if cls is None or not isinstance(present, Mapping):
            raise ConfigError(
                f"cannot set {dotted(self.path)}: {dotted(self.path[:depth])} is {shown(_for_message(data))} "
                f"and has no keys; set {dotted(self.path[:depth])} itself first."
            )
        key = self.path[depth]
        self.known(cls, key, depth)
        old = present[key] if key in present else _default(cls, str(key))
        new = self.put(field_slot(cls, str(key)), old, depth + 1, value)
        return _merge(cls, present, {str(key): new})

    def known(self, cls: type[BaseModel], key: str | int, depth: int) -> None:
        if key not in cls.model_fields:
            raise ConfigError(unknown_key(self.path[: depth + 1], cls, ROOT, self.data))

    def put_plain(self, slot: Slot, data: Any, depth: int, value: Any) -> Any:
        """Set inside a list (by index) or free-form mapping (by key)."""
        key = self.path[depth]
        if isinstance(data, list) and isinstance(key, int) and key <= len(data):
            old = data[key] if key < len(data) else _ABSENT
            new = self.put(slot.item or Slot(), old, depth + 1, value)
            return [*data[:key], new, *data[key + 1 :]]
        if isinstance(data, Mapping) and slot.item is None:
            return {**data, str(key): self.put(Slot(), data.get(str(key), _ABSENT), depth + 1, value)}
        here = dotted(self.path[:depth])
        if isinstance(data, list):
            raise ConfigError(
                f"cannot set {dotted(self.path)}: {here} is a list of {len(data)}; give an index from 0 to "
                f"{len(data)} (the last one appends) or the whole list, {here}=[…]."
            )
        raise ConfigError(
            f"cannot set {dotted(self.path)}: {here} is {shown(_for_message(data))}, which has no keys; "
            f"set {here} itself."
        )

    def assign(self, slot: Slot, data: Any, value: Any) -> Any:
        """The whole value of a slot: plain values replace, sections and parts merge."""
        if slot.family is not None and value is not None:
            return self.assign_part(slot.family, data, value)
        if slot.section is not None and isinstance(value, Mapping):
            present = _opened(slot, data)
            return _merge(slot.section, present, self.below(slot, present, value, self.path))
        return value

    def assign_part(self, family: str, data: Any, value: Any) -> Any:
        """A part after `value` (a kind, or a mapping) is given to it; settings of the part before it carry
        over."""
        given = dict(value) if isinstance(value, Mapping) else {"kind": value}
        previous = None if data is _ABSENT or data is None else self.complete(family, data)
        kind = given.pop("kind", previous["kind"] if previous else None)
        try:
            cls = type(parse_part(family, kind)) if not isinstance(kind, str) else part_class(family, kind)
        except ConfigError as error:
            raise ConfigError(f"{dotted(self.path)}: {error}") from error
        base = {"kind": kind, **plain(cls.inherit(previous) if previous else {})}
        place = self.path[:-1] if self.path[-1] == "kind" else self.path
        return {**base, **self.below(Slot(family=family), base, given, place)}

    def below(self, slot: Slot, present: Any, given: Mapping[str, Any], place: KeyPath) -> dict[str, Any]:
        """The keys in `given`, each set below `place` in a section or part that holds `present` now."""
        result = {}
        for key, item in given.items():
            change = _Change((*place, key), self.data)
            result[key] = change.put(slot, present, len(place), item)[key]
        return result

    def complete(self, family: str, data: Any) -> dict[str, Any]:
        """Plain data of a part with every default, so that what carries over does not depend on what was
        written."""
        try:
            return plain(parse_part(family, data))
        except ValidationError as error:
            raise config_error(error, Slot(family=family), data) from error


def _opened(slot: Slot, data: Any) -> Any:
    """What stands at a slot as a mapping: empty if nothing does, spelled out where a plain value stands for a section."""
    present = {} if data is _ABSENT or data is None else data
    return slot.section.opened(present) if slot.section is not None and issubclass(slot.section, Section) else present


def _merge(cls: type[BaseModel], present: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return cls.merge(present, given) if issubclass(cls, Section) else {**present, **given}


def _for_message(data: Any) -> Any:
    """The data for a message; a setting that is absent counts as null."""
    return None if data is _ABSENT else plain(data)


def _default(cls: type[BaseModel], name: str) -> Any:
    default = default_of(cls, name)
    return _ABSENT if default is REQUIRED else default
