"""`torchstone methods`: the index of methods, for people or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from difflib import get_close_matches
from itertools import groupby
from typing import Annotated

import typer

from torchstone.errors import ConfigError
from torchstone.methods import METHODS, Method


def methods(
    tag: Annotated[list[str] | None, typer.Option(help="Only methods with this tag; repeat for more tags.")] = None,
    done: Annotated[bool, typer.Option("--done", help="Only methods that are done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: papers, tags, claims, and which are done.

    Example: torchstone methods --tag attention
    """
    wanted = {_known(name) for name in tag or []}
    chosen = [item for item in METHODS.values() if wanted <= set(item.tags) and (item.done or not done)]
    if as_json:
        typer.echo(
            json.dumps([{**asdict(item), "paths": item.paths()} for item in chosen], indent=2, ensure_ascii=False)
        )
        return
    for date, items in groupby(chosen, key=lambda item: item.digest):
        typer.echo(f"\n{date}")
        for item in items:
            typer.echo(_entry(item))
    finished = sum(item.done for item in chosen)
    typer.echo(f"\n{len(chosen)} methods, {finished} done. `torchstone where SLUG` prints every path of one.")


def _known(name: str) -> str:
    tags = sorted({tag for item in METHODS.values() for tag in item.tags})
    name = name.lstrip("#").lower()
    if name not in tags:
        near = get_close_matches(name, tags, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no tag {name!r}; tags are: {', '.join(tags)}.{hint}")
    return name


def _entry(item: Method) -> str:
    tags = " ".join(f"#{tag}" for tag in item.tags)
    paper = f"arXiv {item.arxiv}" if item.arxiv else ""
    return f"  {item.slug:<26}{item.status:<9}{paper:<18}{tags}\n      {item.claim}"
