"""Load a recipe from a file, YAML text, plain data or another recipe, with overrides.

Every problem is a ConfigError of one paragraph: `file:line:column`, the dotted path, what was given, what is
allowed and the nearest match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from torchstone.errors import ConfigError
from torchstone.recipe.overrides import ROOT, apply_overrides
from torchstone.recipe.problems import config_error, shown
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import Document, KeyPath, parse_yaml, read_yaml


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe.

    Args:
        source: the path of a YAML file; YAML text (a string of more than one line); plain data; or a Recipe.
        overrides: `key=value` texts, applied from left to right; see `torchstone.recipe.overrides`.

    Raises:
        ConfigError: the file, the text, an override or a setting cannot be used.
    """
    document = _document(source)
    if not isinstance(document.data, Mapping):
        raise ConfigError(
            f"{document.where(())}: a recipe is a mapping with {', '.join(Recipe.model_fields)}; "
            f"{shown(document.data)} was given."
        )
    data, changed = apply_overrides(document.data, overrides)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        places = {path: place for path, place in document.places.items() if not _below(path, changed)}
        kept = Document(document.data, document.name, places) if document.places else None
        raise config_error(error, ROOT, data, kept) from error


def _document(source: str | Path | Mapping[str, Any] | Recipe) -> Document:
    if isinstance(source, Recipe):
        return Document(source.data_dict(), "recipe", {})
    if isinstance(source, Mapping):
        return Document(source, "recipe", {})
    if isinstance(source, str) and "\n" in source:
        return parse_yaml(source)
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no recipe {path}.{_nearest_file(path)}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {shown(str(path))}: {error}. Give the path of a YAML file.") from error
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f" Did you mean {inside}?" if inside.is_file() else ""
        raise ConfigError(f"{path} is a folder; give the path of a recipe's YAML file.{hint}")
    return read_yaml(path)


def _nearest_file(path: Path) -> str:
    try:
        names = sorted(item.name for item in path.parent.iterdir() if item.suffix in (".yaml", ".yml"))
    except OSError:
        return " Give the path of a YAML file."
    near = get_close_matches(path.name, names, n=1)
    if near:
        return f" Did you mean {path.parent / near[0]}?"
    return f" Recipes beside it: {', '.join(names[:8])}." if names else " Give the path of a YAML file."


def _below(path: KeyPath, changed: Sequence[KeyPath]) -> bool:
    return any(path[: len(prefix)] == prefix for prefix in changed)
