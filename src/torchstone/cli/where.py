"""`torchstone where SLUG`: every path of a method."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from torchstone.methods import Method, find, project_root


def where(
    slug: Annotated[str, typer.Argument(help="Slug of a method; see `torchstone methods`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every path of a method: parts, study, fidelity test, vectors, page, results.

    Example: torchstone where differential-transformer
    """
    method = find(slug)
    places = _places(method)
    if as_json:
        typer.echo(json.dumps({name: [str(path) for path in paths] for name, paths in places.items()}, indent=2))
        return
    typer.echo(f"{method.title}\n{method.authors}{', ' + method.url if method.url else ''}\n{method.claim}\n")
    for name, paths in places.items():
        for path in paths:
            typer.echo(f"{name:<15}{_short(path)}{'' if path.exists() else f'  ({_absent(method)})'}")
        if not paths:
            typer.echo(f"{name:<15}({_absent(method)})")


def _places(method: Method) -> dict[str, list[Path]]:
    """Absolute paths; without a checkout, the package's own files only."""
    root = project_root()
    reference = Path(os.environ.get("TORCHSTONE_REFERENCE") or (root or Path()) / "../shared/reference")
    package = Path(__file__).resolve().parents[1]
    places: dict[str, list[Path]] = {}
    for name, paths in method.paths().items():
        if name == "vectors":
            places[name] = [Path(os.path.normpath(reference / path)) for path in paths]
        elif root is not None:
            places[name] = [root / path for path in paths]
        else:
            inside = [Path(path).relative_to("src/torchstone") for path in paths if path.startswith("src/torchstone/")]
            places[name] = [package / path for path in inside]
    return places


def _short(path: Path) -> str:
    """The path relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _absent(method: Method) -> str:
    return "not here" if method.done else "planned"
