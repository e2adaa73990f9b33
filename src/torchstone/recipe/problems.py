"""From pydantic's list of errors to one paragraph for a person.

The paragraph names the first problem's place (file, line and column where a file was read; the dotted path
always), what was given, what is allowed and the nearest match, and then how many more problems there are and
where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from torchstone.errors import ConfigError
from torchstone.recipe.structure import PLAIN, Slot, describe, field_slot, slot_class
from torchstone.recipe.yaml import Document, KeyPath

_LONGEST_VALUE = 60


def dotted(path: Sequence[str | int]) -> str:
    """`model.pattern.0.kind` for a key path; `the recipe` for the empty one."""
    return ".".join(str(step) for step in path) or "the recipe"


def shown(value: Any) -> str:
    """A value as a message shows it: short, and on one line."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def unknown_key(path: KeyPath, cls: type[BaseModel], root: Slot, data: Any) -> str:
    """The sentence about a key that `cls` does not have, with the allowed keys and the nearest match.

    Args:
        path: key path of the unknown key.
        cls: the section or part that it was given to.
        root: the slot of the whole recipe, searched for the same key in another place.
        data: the plain data of the whole recipe.
    """
    key = str(path[-1])
    allowed = list(cls.model_fields)
    near = get_close_matches(key, allowed, n=1) or [name for name in allowed if _initials(name) == key]
    hint = dotted((*path[:-1], near[0])) if near else None
    if hint is None:
        elsewhere = [dotted(place) for place in _places_of(key, root, data, ())]
        hint = elsewhere[0] if elsewhere else None
    of = f" of {dotted(path[:-1])}" if len(path) > 1 else ""
    question = f" Did you mean {hint}?" if hint else ""
    return f"unknown key {dotted(path)}; allowed keys{of}: {', '.join(allowed)}.{question}"


def _initials(name: str) -> str:
    """`lr` for `learning_rate`."""
    return "".join(word[:1] for word in name.split("_"))


def _places_of(key: str, slot: Slot, data: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Every place of the recipe where `key` is allowed, nearest to the root first."""
    try:
        cls = slot_class(slot, data)
    except ConfigError:
        return
    if cls is None:
        return
    if key in cls.model_fields:
        yield (*path, key)
    for name in cls.model_fields:
        inner = data.get(name) if isinstance(data, Mapping) else None
        child = field_slot(cls, name)
        if child.family is not None or child.section is not None:
            yield from _places_of(key, child, inner, (*path, name))


def config_error(error: ValidationError, root: Slot, data: Any, document: Document | None = None) -> ConfigError:
    """The ConfigError that says what pydantic found.

    Args:
        error: pydantic's error from validating `data`.
        root: the slot that `data` fills.
        data: the plain data that was validated.
        document: the text that `data` came from, if there is one, for line numbers.
    """
    found: dict[KeyPath, str] = {}
    for item in sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden"):
        path, cls = _real_path(item["loc"], root, data)
        if path not in found:
            found[path] = _sentence(item, path, cls, root, data)
    first, *others = found
    place = f"{document.where(first)}: " if document is not None else ""
    more = ""
    if others:
        listed = ", ".join(dotted(path) for path in others[:5]) + ("…" if len(others) > 5 else "")
        more = f" ({len(others)} more to mend: {listed})"
    return ConfigError(f"{place}{found[first]}{more}")


def _real_path(location: Sequence[str | int], root: Slot, data: Any) -> tuple[KeyPath, type[BaseModel] | None]:
    """The key path in a pydantic location (which also names union branches), and the class that holds its
    last key."""
    path: list[str | int] = []
    slot, holder = root, None
    for step in location:
        if slot.item is not None and isinstance(step, int):
            slot, holder = slot.item, None
            data = data[step] if isinstance(data, list | tuple) and step < len(data) else None
            path.append(step)
            continue
        cls = _class_or_none(slot, data)
        if cls is None:
            if slot == PLAIN and isinstance(step, int) and isinstance(data, list | tuple):
                path.append(step)
            break
        path.append(step)
        holder = cls
        if step not in cls.model_fields:
            break
        slot = field_slot(cls, str(step))
        data = data.get(step) if isinstance(data, Mapping) else None
    return tuple(path), holder


def _class_or_none(slot: Slot, data: Any) -> type[BaseModel] | None:
    try:
        return slot_class(slot, data)
    except ConfigError:
        return None


def _sentence(item: Any, path: KeyPath, cls: type[BaseModel] | None, root: Slot, data: Any) -> str:
    """What was given, what is allowed, what to do, for one of pydantic's errors."""
    name = next((step for step in reversed(path) if isinstance(step, str)), None)
    info = cls.model_fields.get(name) if cls is not None and name is not None else None
    if item["type"] == "extra_forbidden" and cls is not None:
        return unknown_key(path, cls, root, data)
    meaning = f" ({info.description})" if info is not None and info.description else ""
    if item["type"] == "missing" and info is not None:
        return f"{dotted(path)} is missing; give {_article(describe(info))}{meaning}."
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError) or item["type"] == "value_error":
        text = str(cause).rstrip(".")
        given = f" ({shown(item['input'])} was given)" if not isinstance(item["input"], Mapping) else ""
        return f"{dotted(path)}: {text}{'' if isinstance(cause, ConfigError) else given}."
    if info is not None:
        return f"{dotted(path)} cannot be {shown(item['input'])}; allowed: {describe(info)}{meaning}."
    return f"{dotted(path)}: {item['msg'][0].lower()}{item['msg'][1:]}; {shown(item['input'])} was given."


def _article(words: str) -> str:
    return words if words.startswith(("'", "one of", "true")) else ("an " if words[0] in "aeiou" else "a ") + words
