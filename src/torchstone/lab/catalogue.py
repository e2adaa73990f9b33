"""Find a study by its slug, or remake one from plain data in another process.

Built-in studies are named in `torchstone.methods`; third parties add theirs with the entry-point group
`torchstone.studies` (`slug = "package.module:StudyClass"`). A reference never holds an import path: only a slug that
this index knows, or the specification of a comparison or of a search for learning rates.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from torchstone.errors import StudyError
from torchstone.lab.study import Study
from torchstone.methods import METHODS

GROUP = "torchstone.studies"


def _targets() -> dict[str, str]:
    built_in = {slug: method.study for slug, method in METHODS.items() if method.study and method.done}
    third_party = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    return {**third_party, **built_in}


def slugs() -> tuple[str, ...]:
    """Slugs of all studies that can be run, sorted."""
    return tuple(sorted(_targets()))


def study(slug: str) -> Study:
    """The study of a method; raises StudyError naming the nearest slug."""
    target = _targets().get(slug)
    if target is None:
        near = get_close_matches(slug, slugs(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        planned = " It is planned, not done." if slug in METHODS else ""
        raise StudyError(f"there is no study {slug!r}.{planned} Studies are: {', '.join(slugs())}.{hint}")
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)()


def from_reference(reference: Mapping[str, Any]) -> Study:
    """The study that `Study.reference()` described."""
    if "comparison" in reference:
        from torchstone.lab.comparison import Comparison

        return Comparison.from_spec(reference["comparison"])
    if "rates" in reference:
        from torchstone.lab.rates.trials import RateTrials

        return RateTrials.from_spec(reference["rates"])
    return study(reference["slug"])
