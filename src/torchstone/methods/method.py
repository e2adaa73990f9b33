"""One method: its paper, and every path that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Method:
    """One published method.

    Attributes:
        slug: identifier, used in every file name that belongs to the method.
        title, authors, arxiv: the paper; `arxiv` is None where there is no arXiv paper.
        digest: date of the digest that picked it, ISO 8601.
        tags: topics, as in the digest.
        claim: what the study tests, in one sentence.
        vectors: files of reference vectors in the reference folder.
        parts: source files of the mechanism, relative to the project's root; empty while planned.
        study: `module:Class` of the study; None while planned.
        status: `done` or `planned`.
    """

    slug: str
    title: str
    authors: str
    arxiv: str | None
    digest: str
    tags: tuple[str, ...]
    claim: str
    vectors: tuple[str, ...]
    parts: tuple[str, ...] = ()
    study: str | None = None
    status: Literal["done", "planned"] = "planned"

    @property
    def done(self) -> bool:
        """True if everything that belongs to the method exists."""
        return self.status == "done"

    @property
    def url(self) -> str | None:
        """Address of the paper, if it is on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    def paths(self) -> dict[str, tuple[str, ...]]:
        """Every home of the method, by what is there; paths are relative to the project's root.

        `vectors` are names inside the reference folder ($TORCHSTONE_REFERENCE).
        """
        name = self.slug.replace("-", "_")
        return {
            "parts": self.parts,
            "study": (f"src/torchstone/studies/{name}.py",),
            "fidelity test": (f"tests/reference/test_{name}.py",),
            "vectors": self.vectors,
            "page": (f"docs/methods/{self.slug}.md",),
            "results": (f"results/{self.slug}",),
        }
