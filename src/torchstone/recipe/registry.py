"""Registry of kinds: which class configures `mixer: differential`.

Built-in kinds are listed in `torchstone.kinds` (a table of strings, so that listing kinds imports nothing
heavy). Third parties add kinds with the entry-point group `torchstone.kinds`, one entry per kind, named
`family.kind`:

    [project.entry-points."torchstone.kinds"]
    "mixer.retention" = "my_package.retention:RetentionConfig"

Scripts and notebooks may call `register(family)` as a class decorator instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializeAsAny

from torchstone.errors import ConfigError
from torchstone.kinds import KINDS
from torchstone.recipe.part import Part

GROUP = "torchstone.kinds"
_registered: dict[tuple[str, str], type[Part]] = {}
ConfigClass = TypeVar("ConfigClass", bound=Part)


def register(family: str) -> Callable[[type[ConfigClass]], type[ConfigClass]]:
    """Class decorator that adds a kind for this process (tests, notebooks); packages use the entry-point
    group."""

    def add(cls: type[ConfigClass]) -> type[ConfigClass]:
        kind = str(cls.model_fields["kind"].default)
        if kind in kinds(family) and _registered.get((family, kind)) is None:
            raise ConfigError(f"{family} kind {kind!r} exists already; give the new class another `kind`.")
        _registered[(family, kind)] = cls
        return cls

    return add


@cache
def _third_party() -> dict[tuple[str, str], str]:
    found = {}
    for entry in entry_points(group=GROUP):
        family, _, kind = entry.name.partition(".")
        if kind in KINDS.get(family, {}):
            raise ConfigError(
                f"entry point {entry.name!r} ({entry.value}) would replace a built-in kind; rename it in its package."
            )
        found[(family, kind)] = entry.value
    return found


def kinds(family: str) -> tuple[str, ...]:
    """All kinds of a family, sorted; raises ConfigError for an unknown family."""
    names = set(KINDS.get(family, {}))
    names |= {kind for fam, kind in _third_party() if fam == family}
    names |= {kind for fam, kind in _registered if fam == family}
    if not names:
        raise ConfigError(f"there is no family {family!r}; families are: {', '.join(sorted(KINDS))}.")
    return tuple(sorted(names))


def part_class(family: str, kind: str) -> type[Part]:
    """The configuration class of a kind; raises ConfigError naming the allowed kinds and the nearest
    match."""
    registered = _registered.get((family, kind))
    if registered is not None:
        return registered
    target = KINDS.get(family, {}).get(kind) or _third_party().get((family, kind))
    if target is None:
        allowed = kinds(family)
        near = get_close_matches(str(kind), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown {family} kind {kind!r}; allowed: {', '.join(allowed)}.{hint}")
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def parse_part(family: str, value: Any) -> Part:
    """A part from its kind alone, from a mapping with `kind`, or a part given as it is."""
    if isinstance(value, Part):
        if value.kind not in kinds(family):
            raise ConfigError(f"a {value.kind!r} part is no {family}; allowed: {', '.join(kinds(family))}.")
        return value
    if isinstance(value, str):
        return part_class(family, value).model_validate({})
    if isinstance(value, Mapping):
        if "kind" not in value:
            raise ConfigError(f"the {family} needs the key 'kind'; allowed kinds: {', '.join(kinds(family))}.")
        if not isinstance(value["kind"], str):
            raise ConfigError(
                f"the kind of the {family} is {value['kind']!r:.60}, which is no text; allowed kinds: {', '.join(kinds(family))}."
            )
        return part_class(family, value["kind"]).model_validate(dict(value))
    raise ConfigError(
        f"the {family} is a kind name or a mapping with 'kind'; {value!r:.60} was given. "
        f"Kinds: {', '.join(kinds(family))}."
    )


@dataclass(frozen=True)
class PartField:
    """Mark in an annotation: this field holds a part of `family`."""

    family: str


def part_field(family: str) -> Any:
    """The annotation of a field that holds any part of `family`.

    YAML may give the kind alone (`mixer: differential`), a mapping with `kind`, or a Part.
    """
    return Annotated[SerializeAsAny[Part], BeforeValidator(lambda value: parse_part(family, value)), PartField(family)]
