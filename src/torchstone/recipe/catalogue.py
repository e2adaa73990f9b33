"""The catalogue of kinds: every family, kind and setting with type, default and meaning, from the classes
themselves.

It is what a person reads to write an arm: `torchstone recipe kinds mixer` prints it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from torchstone.errors import ConfigError
from torchstone.kinds import KINDS
from torchstone.recipe.problems import shown
from torchstone.recipe.registry import kinds, part_class
from torchstone.recipe.schema import Recipe
from torchstone.recipe.structure import REQUIRED, Slot, default_of, describe, field_slot, slot_class
from torchstone.recipe.yaml import KeyPath

Catalogue = dict[str, dict[str, dict[str, Any]]]


def family_named(name: str) -> str:
    """A family by its name, or by a place in a recipe (`model.block.mixer`); raises ConfigError."""
    if name in KINDS:
        return name
    found = _family_at(name.split("."))
    if found is None:
        near = get_close_matches(name.split(".")[-1], KINDS, n=1)
        owners = [family for family in KINDS if name in kinds(family)]
        hint = f" Did you mean {near[0]}?" if near else f" {name} is a kind of {owners[0]}." if owners else ""
        raise ConfigError(f"there is no family {name!r}; families are: {', '.join(KINDS)}.{hint}")
    return found


def _family_at(steps: Sequence[str]) -> str | None:
    """The family of the part at a place, looking through the default kind of each part on the way."""
    slot = Slot(section=Recipe)
    for step in steps:
        if slot.item is not None and step.isdigit():
            slot = slot.item
            continue
        cls = slot_class(slot, {"kind": kinds(slot.family)[0]} if slot.family else None)
        if cls is None or step not in cls.model_fields:
            return None
        slot = field_slot(cls, step)
    return (slot.item or slot).family


def catalogue(families: Sequence[str]) -> Catalogue:
    """Family → kind → `doc` (first line) and `settings` (name → type, default, meaning). Imports the kinds'
    modules."""
    return {family: {kind: _kind(part_class(family, kind)) for kind in kinds(family)} for family in families}


def _kind(cls: type[BaseModel]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, info in cls.model_fields.items():
        if name == "kind":
            continue
        default = default_of(cls, name)
        entry = {"type": describe(info), "meaning": info.description or ""}
        if default is not REQUIRED:
            entry["default"] = default
        settings[name] = entry
    return {"doc": _one_line(cls), "settings": settings}


def _one_line(cls: type[BaseModel]) -> str:
    """First telling sentence of the class (one that only repeats `mixer: attention` is skipped) or of its
    module."""
    for doc in (cls.__doc__, sys.modules[cls.__module__].__doc__):
        paragraph = " ".join((doc or "").strip().split("\n\n")[0].split())
        sentences = re.split(r"(?<=[.!?])\s", paragraph)
        telling = [text for text in sentences if text and not re.fullmatch(r"`[\w-]+: [\w-]+`\.?", text)]
        if telling:
            return telling[0]
    return ""


def places(family: str) -> list[str]:
    """Where a recipe takes parts of this family, looking inside every kind of the other families."""
    found = (".".join(map(str, path)) for path in _places(family, Slot(section=Recipe), ()))
    return list(dict.fromkeys(found))


def _places(family: str, slot: Slot, path: KeyPath, inside: tuple[Any, ...] = ()) -> Iterator[KeyPath]:
    """`inside` holds the classes on the way here: a kind that contains its own family (a mixture) is entered once."""
    inner = (slot.item, (*path, 0)) if slot.item is not None else (slot, path)
    if inner[0].family == family:
        yield inner[1]
        return
    choices = [{"kind": kind} for kind in kinds(inner[0].family)] if inner[0].family else [None]
    for cls in (slot_class(inner[0], choice) for choice in choices):
        if cls is None or cls in inside:
            continue
        for name in cls.model_fields:
            yield from _places(family, field_slot(cls, name), (*inner[1], name), (*inside, cls))


def render(found: Catalogue) -> str:
    """The catalogue as text: one block per kind, one line per setting."""
    blocks = []
    for family, entries in found.items():
        for kind, entry in entries.items():
            lines = [f"{family}: {kind}", f"    {entry['doc']}"]
            lines += [_line(name, setting) for name, setting in entry["settings"].items()]
            blocks.append("\n".join(line for line in lines if line.strip()))
    return "\n\n".join(blocks)


def _line(name: str, setting: dict[str, Any]) -> str:
    default = "required" if "default" not in setting else f"default {_default(setting['default'])}"
    meaning = f"  {setting['meaning']}" if setting["meaning"] else ""
    return f"    {name:<19} {setting['type']}; {default}.{meaning}"


def _default(value: Any) -> str:
    if isinstance(value, dict) and "kind" in value:
        return str(value["kind"])
    return shown(value)
