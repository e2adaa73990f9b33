"""What may stand at each place of a recipe: the tree of sections, parts and plain values behind its classes.

Error messages, overrides and the list of kinds all ask the same questions (which keys are allowed here? is
this a part, and of which family? what is the type in plain words?), so the answers are worked out once, here,
from the annotations.

A `Slot` describes one place:
  section  a fixed block with known keys (`budget`)                     `section` is its class
  part     a swappable block (`model.block.mixer`)                      `family` is its family
  many     a list of slots (`model.pattern`)                            `item` describes one entry
  plain    a number, text, or free-form data                            none of the above
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from torchstone.recipe.part import Part, plain
from torchstone.recipe.registry import PartField, parse_part, part_class

REQUIRED = object()


@dataclass(frozen=True)
class Slot:
    """One place of a recipe, see the module docstring. `optional`: null is allowed."""

    family: str | None = None
    section: type[BaseModel] | None = None
    item: Slot | None = None
    optional: bool = False


PLAIN = Slot()


def field_slot(cls: type[BaseModel], name: str) -> Slot:
    """The slot of a field of a section or part."""
    return _fields(cls)[name]


@cache
def _fields(cls: type[BaseModel]) -> dict[str, Slot]:
    return {name: _slot(info.annotation, tuple(info.metadata)) for name, info in cls.model_fields.items()}


def _slot(annotation: Any, metadata: tuple[Any, ...] = ()) -> Slot:
    for item in metadata:
        if isinstance(item, PartField):
            return Slot(family=item.family)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _slot(arguments[0], tuple(annotation.__metadata__))
    if origin in (Union, types.UnionType):
        slots = [_slot(argument) for argument in arguments if argument is not type(None)]
        shaped = [slot for slot in slots if slot != PLAIN]
        optional = type(None) in arguments
        if len(shaped) == 1:
            return Slot(shaped[0].family, shaped[0].section, shaped[0].item, optional or shaped[0].optional)
        return Slot(optional=optional)
    if origin in (tuple, list) and arguments:
        item = _slot(arguments[0])
        return Slot(item=item) if item != PLAIN else PLAIN
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation is not Part:
        return Slot(section=annotation)
    return PLAIN


def slot_class(slot: Slot, data: Any) -> type[BaseModel] | None:
    """The class whose fields are the allowed keys at `slot`, given what stands there; None for plain values.

    Raises ConfigError if `data` names a kind that does not exist.
    """
    if slot.section is not None:
        return slot.section
    if slot.family is None:
        return None
    if isinstance(data, Part):
        return type(data)
    kind = data.get("kind") if isinstance(data, Mapping) else data
    return part_class(slot.family, kind) if isinstance(kind, str) else None


def default_of(cls: type[BaseModel], name: str) -> Any:
    """A field's default as complete plain data, or `REQUIRED`."""
    value = cls.model_fields[name].get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return REQUIRED
    family = field_slot(cls, name).family
    return plain(parse_part(family, value) if family is not None and value is not None else value)


def describe(info: FieldInfo) -> str:
    """A field's type and bounds in plain words: `integer > 0 or null`, `one of 'auto', 'fp32', 'bf16'`."""
    text = _words(info.annotation, tuple(info.metadata))
    bounds = " and ".join(f"{_BOUNDS[name]} {value:g}" for item in info.metadata for name, value in _bounds(item))
    noun = "integer" if "integer" in text else "number"
    return text.replace(noun, f"{noun} {bounds}", 1) if bounds else text


_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def _bounds(item: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(item, name)) for name in _BOUNDS if isinstance(getattr(item, name, None), int | float)]


def _words(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    slot = _slot(annotation, metadata)
    null = " or null" if slot.optional else ""
    if slot.family is not None:
        return f"{slot.family} part{null}"
    if slot.section is not None:
        plain_form = getattr(slot.section, "plain_form", "")
        either = f"{plain_form}, or " if plain_form else ""
        return f"{either}mapping with {', '.join(slot.section.model_fields)}{null}"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], tuple(annotation.__metadata__))
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin in (tuple, list):
        return _list_words(arguments)
    if origin is dict:
        return "mapping"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _list_words(arguments: tuple[Any, ...]) -> str:
    if arguments and arguments[-1] is not Ellipsis and len(arguments) > 1:
        return f"list of {len(arguments)}: " + ", ".join(_words(argument) for argument in arguments)
    return f"list of {_words(arguments[0])}" if arguments else "list"
