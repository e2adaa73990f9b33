"""Text files as a corpus, by path, glob or URL. Formats and what makes a row bad: `torchstone.data.rows`.

Bad rows fail closed: the first is an error with `file:line` and the reason. With `skip_bad` they are left
out, counted exactly and listed in the quarantine of the tokenised corpus; more than `skip_bad_cap` of all
rows is an error still, since that is rarely a few bad rows.

A document's id is the row's `id` field, else `file:line`. File names in ids are relative to the folder that
holds all the files, so that the fingerprint does not depend on where they lie.

Pitfall: the fingerprint reads every local file once. Remote files are identified by what their store says
(size and entity tag or time), not by their content.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import Field

from torchstone.data.corpus import Document, Reject, Rejected
from torchstone.data.rows import Format, Row, reader_of
from torchstone.errors import DataError
from torchstone.recipe.part import Part
from torchstone.storage.hashing import file_hash, fingerprint_of
from torchstone.storage.locations import expand, open_binary
from torchstone.storage.names import safe_text


class FilesConfig(Part):
    """Plain text, JSON lines and Parquet files."""

    family: ClassVar[str] = "corpus"
    kind: Literal["files"] = "files"
    paths: str | tuple[str, ...] = Field(description="paths, globs or URLs; one, or a list in order")
    text_field: str = Field(default="text", description="field of a row that holds its text")
    skip_bad: bool = Field(default=False, description="leave bad rows out instead of stopping at the first")
    skip_bad_cap: float = Field(default=0.01, ge=0, le=1, description="share of bad rows above which to stop")
    max_line_bytes: int = Field(default=32_000_000, gt=0, description="a longer line is a bad row")

    def build(self) -> FilesCorpus:
        """The corpus; raises DataError if nothing matches or a file has an ending that is not known."""
        return FilesCorpus(self)


class FilesCorpus:
    """Documents of the files in order."""

    def __init__(self, settings: FilesConfig) -> None:
        self.settings = settings
        patterns = [settings.paths] if isinstance(settings.paths, str) else settings.paths
        self.locations = list(dict.fromkeys(location for pattern in patterns for location in expand(pattern)))
        if not self.locations:
            raise DataError("data.corpus.paths is empty; give at least one path, glob or URL.")
        self._readers = [reader_of(location) for location in self.locations]
        self._names = _relative(self.locations)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of file names, contents and the settings that decide what is read or refused."""
        settings = self.settings.model_dump(mode="json", exclude={"paths"})
        files = [[name, _content(at)] for name, at in zip(self._names, self.locations, strict=True)]
        return fingerprint_of({"settings": settings, "files": files})

    def documents(self, reject: Reject | None = None) -> Iterator[Document]:
        """All good rows.

        Raises:
            DataError: a bad row, or with `skip_bad` too many of them; a file that cannot be read.
            DependencyError: a format needs a package that is not installed.
        """
        total, bad, last = 0, 0, ""
        form = Format(self.settings.text_field, self.settings.max_line_bytes)
        for location, name, reader in zip(self.locations, self._names, self._readers, strict=True):
            with open_binary(location) as file:
                for row in reader(file, location, form):
                    total += 1
                    if not row.reason:
                        yield Document(row.id or f"{name}:{row.line}", f"{name}:{row.line}", row.text)
                        continue
                    bad += 1
                    last = self._bad(location, row)
                    if reject is not None:
                        reject(Rejected(f"{name}:{row.line}", row.reason, row.excerpt))
        if bad > self.settings.skip_bad_cap * total:
            raise DataError(
                f"{bad} of {total} rows are bad, more than skip_bad_cap={self.settings.skip_bad_cap} "
                f"allows; the last is {last}. Mend the files, or raise data.corpus.skip_bad_cap."
            )

    def _bad(self, location: str, row: Row) -> str:
        """Description of a bad row; raises it as DataError unless bad rows are skipped."""
        what = safe_text(f"{location}:{row.line}: {row.reason}")
        if not self.settings.skip_bad:
            shown = f" The row begins: {safe_text(row.excerpt)!r}." if row.excerpt else ""
            raise DataError(f"{what}.{shown} Mend it, or leave such rows out: data.corpus.skip_bad=true.")
        return what


def _relative(locations: list[str]) -> list[str]:
    """Names of the files relative to the folder that holds them all."""
    parents = [location.rpartition("/")[0] for location in locations]
    shared = os.path.commonprefix([parent.split("/") for parent in parents])
    return ["/".join(location.split("/")[len(shared) :]) for location in locations]


def _content(location: str) -> str:
    """What identifies a file's content."""
    system, path = fsspec.core.url_to_fs(location)
    try:
        return file_hash(path) if isinstance(system, LocalFileSystem) else str(system.checksum(path))
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from error
