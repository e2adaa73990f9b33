"""The index of methods: one record for each, and every path that belongs to it.

`METHODS` maps a slug to its record. Mechanism, measurement and claim live in three places (`nn` and its
neighbours, `diagnose` and `evals`, `studies`), tied by the slug; `torchstone where SLUG` prints them all. A
method is `done` when parts, study, fidelity test, page and results exist (a test walks this index and
checks); else it is `planned`.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from torchstone.errors import StudyError
from torchstone.methods import (
    digest_2024_04_12,
    digest_2024_10_08,
    digest_2024_10_10,
    digest_2024_10_14,
    digest_2024_11_04,
)
from torchstone.methods.method import Method

__all__ = ["METHODS", "Method", "find", "project_root"]

DIGESTS = (digest_2024_04_12, digest_2024_10_08, digest_2024_10_10, digest_2024_10_14, digest_2024_11_04)
METHODS: dict[str, Method] = {method.slug: method for digest in DIGESTS for method in digest.RECORDS}


def find(slug: str) -> Method:
    """The method with this slug; raises StudyError naming the nearest slugs."""
    if slug in METHODS:
        return METHODS[slug]
    near = get_close_matches(slug.lower().replace("_", "-"), METHODS, n=3, cutoff=0.5)
    if not near and len(slug) >= 4:
        near = [name for name in METHODS if slug.lower() in METHODS[name].title.lower()][:3]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise StudyError(f"there is no method {slug!r}.{hint} `torchstone methods` lists all {len(METHODS)}.")


def project_root() -> Path | None:
    """The project's folder when torchstone runs from a checkout; None when it is installed as a package
    only."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else None
