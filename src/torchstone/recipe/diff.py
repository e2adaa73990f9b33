"""How two recipes differ: the intervention of an arm, or what changed since a run was started.

Differences are listed by dotted path in the recipe's own order. Where a part changes its kind, the kind is
one difference; of the settings that only the new kind has, those that differ from its defaults are listed too
(the others follow from the kind).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from torchstone.recipe.part import Part, plain
from torchstone.recipe.schema import Recipe
from torchstone.recipe.structure import default_of


class Difference(NamedTuple):
    """One difference as plain data. A side that has no such setting holds None."""

    path: str
    before: Any
    after: Any


def differences(before: Recipe, after: Recipe) -> list[Difference]:
    """Every setting in which `after` differs from `before`; empty if and only if the recipes are equal."""
    return list(_models(before, after, ""))


def _models(before: BaseModel, after: BaseModel, prefix: str) -> Iterator[Difference]:
    switched = isinstance(before, Part) and isinstance(after, Part) and before.kind != after.kind
    for name in type(after).model_fields:
        path, new = f"{prefix}{name}", getattr(after, name)
        if name in type(before).model_fields:
            yield from _values(getattr(before, name), new, path)
        elif plain(new) != default_of(type(after), name):
            yield Difference(path, None, plain(new))
    if not switched:
        for name in type(before).model_fields:
            if name not in type(after).model_fields:
                yield Difference(f"{prefix}{name}", plain(getattr(before, name)), None)


def _values(before: Any, after: Any, path: str) -> Iterator[Difference]:
    if _spelled_out(before, after):
        yield from _models(before, after, f"{path}.")
    elif isinstance(before, Mapping) and isinstance(after, Mapping) and before.keys() == after.keys():
        for key in after:
            yield from _values(before[key], after[key], f"{path}.{key}")
    elif isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after) and _has_parts(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _values(*pair, f"{path}.{index}")
    elif plain(before) != plain(after):
        yield Difference(path, plain(before), plain(after))


def _spelled_out(before: Any, after: Any) -> bool:
    """True for two sections or parts, unless one plain value stands for each."""
    models = isinstance(before, BaseModel) and isinstance(after, BaseModel)
    return models and any(isinstance(plain(value), Mapping) for value in (before, after))


def _has_parts(items: tuple[Any, ...]) -> bool:
    return any(isinstance(item, BaseModel) for item in items)
