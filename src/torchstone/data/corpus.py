"""Corpus: documents in a fixed order, each with a name and the place where it was read.

A corpus is read from its start every time; reading it twice gives the same documents. What cannot be used is
a DataError with `file:line` and the reason, unless the corpus is told to skip; then each bad row is reported
to `reject` and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        id: its name, the same on every machine; decides whether it is held out.
        location: `file:line`, for people.
        text: not empty, without NUL characters.
    """

    id: str
    location: str
    text: str


@dataclass(frozen=True)
class Rejected:
    """A row that was left out: where it is, why, and its first characters."""

    location: str
    reason: str
    excerpt: str


Reject = Callable[[Rejected], None]


class Corpus(Protocol):
    """Documents in a fixed order. `fingerprint`: hexadecimal, equal exactly when all documents are equal."""

    @property
    def fingerprint(self) -> str: ...

    def documents(self, reject: Reject | None = None) -> Iterator[Document]:
        """All documents; bad rows are given to `reject` where the corpus skips them.

        Raises:
            DataError: a bad row where the corpus does not skip, or too many where it does.
        """
        ...
