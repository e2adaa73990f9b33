"""Part: a swappable piece of a recipe, as data that can build the real thing.

A part is a frozen pydantic model whose `kind` is a literal string. Its family (`mixer`, `position`, `corpus`
…) is a class variable. `build(...)` makes the object; what it takes depends on the family. A field that holds
a part is typed with `registry.part_field`.

Pitfall: kinds are resolved through the registry only; a recipe can never name a Python path.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Strict(BaseModel):
    """Base of parts and sections: immutable, and strict about unknown keys, numbers and true/false."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads `true` as 1 where a number is due; a recipe that says so is mistaken."""
        if isinstance(value, bool) and info.field_name is not None and _takes_number(cls, info.field_name):
            raise ValueError("a number is due, not true or false")
        return value


@cache
def _takes_number(cls: type[BaseModel], name: str) -> bool:
    annotation = cls.model_fields[name].annotation
    allowed = {annotation, *get_args(annotation)}
    return bool(allowed & {int, float}) and not allowed & {bool, Any}


class Part(Strict):
    """Base of every part configuration."""

    family: ClassVar[str]
    kind: str

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that this kind keeps when it replaces a part of another kind in the same place.

        Args:
            previous: the plain data of the replaced part, its `kind` included.

        Returns:
            plain data for this kind without `kind`: by default every field that both kinds have. A kind
            overrides this where a field of the same name means something else.
        """
        shared = set(cls.model_fields) - {"kind"}
        return {key: value for key, value in previous.items() if key in shared}


def plain(value: Any) -> Any:
    """Plain data (what YAML holds) of a value that may hold sections, parts, tuples or mappings."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
