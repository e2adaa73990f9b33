"""A data set of the Hugging Face hub as a corpus, through the `datasets` library.

Only data is read: `trust_remote_code` is never given, so a data set that is a script is refused by the
library.

Pitfall: a data set changes on the hub unless `revision` names a commit. The fingerprint covers the settings
and the content that the library has stored; give a commit to get the same one tomorrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from torchstone.data.corpus import Document, Reject
from torchstone.errors import DataError, DependencyError
from torchstone.recipe.part import Part
from torchstone.storage.hashing import fingerprint_of


class HuggingFaceConfig(Part):
    """Rows of a hub data set."""

    family: ClassVar[str] = "corpus"
    kind: Literal["huggingface"] = "huggingface"
    name: str = Field(description="data set on the hub, for example `roneneldan/TinyStories`")
    subset: str | None = Field(default=None, description="configuration of the data set, if it has several")
    split: str = Field(default="train", description="split to read, in the library's notation: `train[:1%]`")
    revision: str | None = Field(default=None, description="commit, tag or branch; null: the newest")
    text_field: str = Field(default="text", description="column that holds the text")

    def build(self) -> HubCorpus:
        """The corpus; downloads the data set unless it is stored already."""
        return HubCorpus(self)


class HubCorpus:
    """Documents of a hub data set in its order."""

    def __init__(self, settings: HuggingFaceConfig) -> None:
        self.settings = settings
        self._rows = _load(settings)
        if settings.text_field not in self._rows.column_names:
            raise DataError(
                f"{settings.name} has no column {settings.text_field!r}; its columns: "
                f"{', '.join(self._rows.column_names)}. Set data.corpus.text_field."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the settings and of the library's own fingerprint of the rows."""
        settings = self.settings.model_dump(mode="json")
        return fingerprint_of([settings, len(self._rows), self._rows._fingerprint])

    def documents(self, reject: Reject | None = None) -> Iterator[Document]:
        """Every row with text; raises DataError at a row whose text is no string. Blank rows are left out."""
        for number, row in enumerate(self._rows):
            text = row[self.settings.text_field]
            location = f"{self.settings.name}:{number}"
            if not isinstance(text, str) or "\0" in text:
                raise DataError(
                    f"{location}: column {self.settings.text_field!r} holds "
                    f"{'a NUL character' if isinstance(text, str) else type(text).__name__} where plain "
                    "text is due; choose another column or revision."
                )
            if text.strip():
                yield Document(location, location, text)


def _load(settings: HuggingFaceConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            f"the data set {settings.name} needs datasets; run: pip install 'torchstone[hf]'"
        ) from error
    try:
        return datasets.load_dataset(settings.name, settings.subset, split=settings.split, revision=settings.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the data set {settings.name} (split {settings.split}, revision "
            f"{settings.revision or 'newest'}) cannot be loaded: {error}"
        ) from error
