"""Python's own standard library as a corpus: about ten megabytes of real text on every machine, no download.

Which files: all `.py` sources of the running Python, by relative path. Left out is what differs between two
installations of the same version: tests, installed packages, files that the build generates, and the packages
that system distributions ship apart (tkinter, idlelib, ensurepip, …). Empty files hold no text and are left
out.

Pitfall: another Python version is another corpus, with another fingerprint.
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from torchstone.data.corpus import Document, Reject
from torchstone.errors import DataError
from torchstone.recipe.part import Part
from torchstone.storage.hashing import bytes_hash, fingerprint_of

_FOLDERS = frozenset(
    {
        "__pycache__",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "test",
        "tests",
        "idle_test",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "tkinter",
        "turtledemo",
        "venv",
    }
)
_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "_distutils_system_mod", "_sysconfig_vars")


class StdlibConfig(Part):
    """Sources of Python's standard library."""

    family: ClassVar[str] = "corpus"
    kind: Literal["stdlib"] = "stdlib"

    def build(self) -> StdlibCorpus:
        """The corpus; raises DataError if this Python was installed without its sources."""
        return StdlibCorpus(Path(sysconfig.get_paths()["stdlib"]))


class StdlibCorpus:
    """One document a source file.

    Args:
        root: the folder of the standard library.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted(self._sources(), key=lambda path: path.relative_to(root).as_posix())
        if not self.files:
            raise DataError(
                f"this Python has no standard-library sources in {root}; install one with its .py files, "
                "or use another corpus, for example data.corpus.kind=files data.corpus.paths=my-text/*.txt."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every file's relative path and content."""
        return fingerprint_of(
            [[path.relative_to(self.root).as_posix(), bytes_hash(path.read_bytes())] for path in self.files]
        )

    def documents(self, reject: Reject | None = None) -> Iterator[Document]:
        """Every file in the order of its relative path; nothing here is rejected."""
        for path in self.files:
            with tokenize.open(path) as file:  # honours the coding line of a source file
                text = file.read().replace("\0", "")
            if text.strip():
                name = path.relative_to(self.root).as_posix()
                yield Document(name, f"{name}:1", text)

    def _sources(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name not in _FOLDERS and not name.startswith("config-")]
            for name in names:
                if name.endswith(".py") and not name.startswith(_FILES):
                    yield Path(folder, name)
