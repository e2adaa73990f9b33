"""Published data of others, which is never part of this repository.

A file is looked for in the folder `$TORCHSTONE_DATA`, by default `../shared/data` from the project's root.
Where it is absent, `notice` says which public repository and file it comes from and that file's hash;
studies then run on generated data and say so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torchstone.errors import DataError


@dataclass(frozen=True)
class Source:
    """Where a published file comes from.

    Attributes:
        path: relative to the data folder.
        repository, file, revision: its public origin.
        sha256: of the file at the origin.
        what: one sentence on the content and on how the local file was made from it.
    """

    path: str
    repository: str
    file: str
    revision: str
    sha256: str
    what: str


SOURCES: dict[str, Source] = {
    source.path: source
    for source in (
        Source(
            path="osca/bigcodebench_hard.csv",
            repository="https://github.com/LeiLiLab/OSCA",
            file="bcb_results.json",
            revision="d855617",
            sha256="82cdc59038d9c1e3b6ffbc1df4b86aed3c4359b163f83092c6017cb8edf86d02",
            what=(
                "passing samples out of 300 per problem of BigCodeBench-Hard and sampling configuration, as "
                "a table with the columns split, problem and one per configuration, and a first row that "
                "holds the runs"
            ),
        ),
    )
}


def data_root() -> Path:
    """The folder of published data; it need not exist."""
    default = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    return Path(os.environ.get("TORCHSTONE_DATA") or default)


def published(path: str) -> Path | None:
    """The published file `path` (a key of `SOURCES`), or None where it is absent.

    Raises:
        DataError: the path is not a known source.
    """
    _source(path)
    found = data_root() / path
    return found if found.is_file() else None


def notice(path: str) -> str:
    """One paragraph: what is absent, where it comes from, its hash, where to put it."""
    source = _source(path)
    return (
        f"{path} is not in {data_root()}. It comes from {source.repository} (file {source.file}, revision "
        f"{source.revision}, sha256 {source.sha256}): {source.what}. Put it there, or set TORCHSTONE_DATA to "
        "the folder that has it."
    )


def _source(path: str) -> Source:
    if path not in SOURCES:
        raise DataError(f"{path!r} is not a known published file; known: {', '.join(SOURCES)}.")
    return SOURCES[path]
