"""YAML for recipes: a small, strict reader and a writer that it understands.

The reader builds plain data (mappings with text keys, lists, text, numbers, booleans, null) from the event
stream of PyYAML, and refuses what a recipe never needs before it can cost anything:

- more than 256 KiB of text, 64 levels of nesting, 10 000 values (aliases counted as what they stand for), 100
  aliases;
- every tag (`!!python/object`, `!anything`): plain data needs none;
- a key that appears twice, a key that is not text, a second document;
- numbers that are not finite.

Scalars follow the core schema of YAML 1.2, not PyYAML's YAML 1.1: `3e-4` is a number, `on`, `off`, `yes` and
`no` are text, `010` is ten. Merge keys (`<<`) are not supported; an anchor and its aliases are.

Every error is a ConfigError that starts with `file:line:column`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml as pyyaml

from torchstone.errors import ConfigError
from torchstone.recipe.part import plain

MAX_BYTES = 256 * 1024
MAX_DEPTH = 64
MAX_VALUES = 10_000
MAX_ALIASES = 100

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OTHER_BASE = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_LONGEST_NUMBER = 100
_LINE_BREAKS = "\n\r\x85\u2028\u2029"

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """Plain data and where each value stands in the text.

    Attributes:
        data: what the document holds.
        name: file name for messages.
        places: key path → (line, column), counted from 1, of the key (or list item).
    """

    data: Any
    name: str
    places: Mapping[KeyPath, tuple[int, int]]

    def where(self, path: KeyPath) -> str:
        """`name:line:column` of a value, or of its nearest ancestor that is in the text."""
        while path and path not in self.places:
            path = path[:-1]
        line, column = self.places.get(path, (1, 1))
        return f"{self.name}:{line}:{column}"


def read_yaml(path: Path) -> Document:
    """Read one YAML file; raises ConfigError if it is missing, too large, not UTF-8 or not plain data."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}. Give the path of a YAML file.") from error
    return parse_yaml(raw, str(path))


def parse_yaml(text: str | bytes, name: str = "<text>") -> Document:
    """Parse one YAML document of plain data.

    Args:
        text: the document; bytes must be UTF-8.
        name: what messages call it.

    Raises:
        ConfigError: anything that the module docstring lists, or a syntax error, with its position.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name}:1:1: the text is longer than {MAX_BYTES // 1024} KiB, the limit for a recipe.")
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{name}:{line}:{column}: the text is not UTF-8; save the file as UTF-8.") from error
    try:
        return _Reader(decoded, name).document()
    except pyyaml.reader.ReaderError as error:
        line = decoded.count("\n", 0, error.position) + 1
        column = error.position - decoded.rfind("\n", 0, error.position)
        raise ConfigError(
            f"{name}:{line}:{column}: character U+{int(error.character):04X} is not allowed in YAML; remove it."
        ) from error
    except pyyaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else f"{name}:1:1"
        detail = f"{error.context}: {error.problem}" if error.context else f"{error.problem}"
        raise ConfigError(f"{place}: this is not valid YAML ({detail}); mend the text there.") from error


@dataclass
class _Anchor:
    """A value that aliases may stand for; `size` is None while the value is still being read."""

    value: Any = None
    size: int | None = None


@dataclass
class _Reader:
    """Builds plain data from PyYAML's events; depth and size are checked before anything is built."""

    text: str
    name: str
    values: int = 0
    aliases: int = 0
    anchors: dict[str, _Anchor] = field(default_factory=dict)
    places: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)

    def document(self) -> Document:
        self.loader = pyyaml.SafeLoader(self.text)
        try:
            self.loader.get_event()
            if self.loader.check_event(pyyaml.StreamEndEvent):
                return Document(None, self.name, {})
            self.loader.get_event()
            data = self.value((), 0)
            self.loader.get_event()
            if not self.loader.check_event(pyyaml.StreamEndEvent):
                self.refuse(self.loader.peek_event(), "a second document starts here; a recipe is one document")
            return Document(data, self.name, self.places)
        finally:
            self.loader.dispose()

    def refuse(self, event: Any, problem: str) -> None:
        mark = event.start_mark
        raise ConfigError(f"{self.name}:{mark.line + 1}:{mark.column + 1}: {problem}.")

    def value(self, path: KeyPath, depth: int) -> Any:
        """The value that the next events make; counts it, and what it holds, towards the limits."""
        event = self.loader.get_event()
        self.count(event, 1)
        self.places.setdefault(path, (event.start_mark.line + 1, event.start_mark.column + 1))
        if isinstance(event, pyyaml.AliasEvent):
            return self.alias(event)
        if event.tag is not None:
            self.refuse(event, f"the tag {event.tag!r} is not allowed; a recipe is plain data, text goes in quotes")
        if isinstance(event, pyyaml.ScalarEvent):
            data, before = self.scalar(event), self.values - 1
            if event.anchor:
                self.anchors[event.anchor] = _Anchor(data, self.values - before)
            return data
        if depth >= MAX_DEPTH:
            self.refuse(event, f"nesting is deeper than {MAX_DEPTH} levels, the limit for a recipe")
        anchor, before = _Anchor(), self.values - 1
        if event.anchor:
            self.anchors[event.anchor] = anchor
        sequence = isinstance(event, pyyaml.SequenceStartEvent)
        anchor.value = self.sequence(path, depth) if sequence else self.mapping(path, depth)
        anchor.size = self.values - before
        return anchor.value

    def count(self, event: Any, number: int) -> None:
        self.values += number
        if self.values > MAX_VALUES:
            self.refuse(event, f"the text stands for more than {MAX_VALUES} values, the limit for a recipe")

    def alias(self, event: Any) -> Any:
        self.aliases += 1
        anchor = self.anchors.get(event.anchor)
        if self.aliases > MAX_ALIASES:
            self.refuse(event, f"more than {MAX_ALIASES} aliases, the limit for a recipe")
        if anchor is None:
            self.refuse(event, f"the alias *{event.anchor} has no anchor before it; quote the text if none is meant")
        assert anchor is not None
        if anchor.size is None:
            self.refuse(event, f"the alias *{event.anchor} stands inside the value that it names")
        assert anchor.size is not None
        self.count(event, anchor.size)
        return anchor.value

    def sequence(self, path: KeyPath, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self.loader.check_event(pyyaml.SequenceEndEvent):
            items.append(self.value((*path, len(items)), depth + 1))
        self.loader.get_event()
        return items

    def mapping(self, path: KeyPath, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self.loader.check_event(pyyaml.MappingEndEvent):
            event = self.loader.peek_event()
            key = self.value((*path, ""), depth + 1) if isinstance(event, pyyaml.ScalarEvent) else None
            self.places.pop((*path, ""), None)
            if not isinstance(key, str):
                self.refuse(event, "a key is text; put quotes around a key that looks like something else")
            assert isinstance(key, str)
            if key in found:
                first = self.places[(*path, key)][0]
                self.refuse(event, f"the key {key!r} appears twice in one mapping (first in line {first})")
            self.places[(*path, key)] = (event.start_mark.line + 1, event.start_mark.column + 1)
            found[key] = self.value((*path, key), depth + 1)
        self.loader.get_event()
        return found

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if not event.implicit[0]:
            return text
        if _NOT_FINITE.match(text):
            self.refuse(event, f"{text} is not a finite number; give a finite one, or quote the text")
        number = bool(_INT.match(text) or _FLOAT.match(text) or _OTHER_BASE.match(text))
        if number and len(text) > _LONGEST_NUMBER:
            self.refuse(event, f"a number has more than {_LONGEST_NUMBER} characters; quote it if it is text")
        result = plain_scalar(text)
        if isinstance(result, float) and not math.isfinite(result):
            self.refuse(event, f"{text} is too large for a number; give a finite one")
        return result


def plain_scalar(text: str) -> None | bool | int | float | str:
    """What an unquoted scalar means under YAML 1.2's core schema."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text, 10)
    if _OTHER_BASE.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    return text


class _Dumper(pyyaml.SafeDumper):
    """Quotes every text that the reader above, or a YAML 1.1 reader, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def _text(self, data: str) -> pyyaml.ScalarNode:
        style = '"' if any(mark in data for mark in _LINE_BREAKS) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def _number(self, data: float) -> pyyaml.ScalarNode:
        if not math.isfinite(data):
            raise ConfigError(f"{data} cannot be written to a recipe; numbers are finite.")
        return self.represent_scalar("tag:yaml.org,2002:float", repr(data))


_Dumper.yaml_implicit_resolvers = {key: list(value) for key, value in pyyaml.SafeDumper.yaml_implicit_resolvers.items()}
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _OTHER_BASE, ["0"])
_Dumper.add_representer(float, _Dumper._number)
_Dumper.add_representer(str, _Dumper._text)


def dump_yaml(data: Any) -> str:
    """YAML text of a recipe, a part or plain data; `parse_yaml` gives the same plain data back, bit for bit.

    Args:
        data: a Recipe, a section, a part, or mappings with text keys, lists, text, finite numbers, booleans,
        None.

    Raises:
        ConfigError: a number is not finite, or a value is not plain data.
    """
    try:
        return pyyaml.dump(
            plain(data),
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=110,
            default_flow_style=None,
        )
    except pyyaml.representer.RepresenterError as error:
        raise ConfigError(f"only plain data can be written as YAML; {error}.") from error
