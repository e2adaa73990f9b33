"""The help topics of Python as a corpus: 0.4 megabytes of English technical prose on every machine, no download.

They are the chapters of the language reference that `help()` shows (`pydoc_data.topics`), one document a topic. Topics repeat
each other's passages (half of the text); each passage is kept once, in the first topic by name, so that held-out topics are not
training text as well. The corpus `stdlib` leaves the topics out, so that the two can be mixed as two different texts.

Pitfall: another Python version has other topics, with another fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import ClassVar, Literal

from torchstone.data.corpus import Document, Reject
from torchstone.errors import DataError
from torchstone.recipe.part import Part
from torchstone.storage.hashing import fingerprint_of


class PythonHelpConfig(Part):
    """Help topics of the running Python."""

    family: ClassVar[str] = "corpus"
    kind: Literal["python-help"] = "python-help"

    def build(self) -> PythonHelpCorpus:
        """The corpus; raises DataError if this Python was installed without its help topics."""
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise DataError(
                "this Python has no help topics (module pydoc_data.topics); install one with its whole standard library, or "
                "use another corpus, for example data.corpus.kind=files data.corpus.paths=my-text/*.txt."
            ) from error
        return PythonHelpCorpus(topics)


class PythonHelpCorpus:
    """One document a topic, of the passages that no topic before it has.

    Args:
        topics: name → text. A passage is what stands between empty lines.
    """

    def __init__(self, topics: Mapping[str, str]) -> None:
        seen: set[str] = set()
        self.topics: dict[str, str] = {}
        for name, text in sorted(topics.items()):
            passages = {" ".join(passage.split()): passage.strip("\n") for passage in text.split("\n\n")}
            self.topics[name] = "\n\n".join(passage for key, passage in passages.items() if key and key not in seen)
            seen.update(passages)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every topic's name and text."""
        return fingerprint_of([[name, text] for name, text in self.topics.items()])

    def documents(self, reject: Reject | None = None) -> Iterator[Document]:
        """Every topic in the order of its name; nothing here is rejected."""
        for name, text in self.topics.items():
            if text.strip():
                yield Document(name, f"pydoc_data/topics.py:{name}", text)
