"""Which documents are held out.

A document is held out if the hash of its id falls below the fraction: adding documents never moves the others
from one side to the other. A corpus of few long documents (a single text file, say) cannot be divided so;
there the last part of every document is held out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from torchstone.data.corpus import Document
from torchstone.storage.hashing import bytes_hash

ENOUGH = 5  # held-out documents to expect of a corpus, below which its documents are cut instead


def held_out(id: str, fraction: float) -> bool:
    """True for about `fraction` of all ids."""
    return int(bytes_hash(id.encode("utf-8", "surrogatepass"))[:13], 16) < fraction * 16**13


def split(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Document, bool]]:
    """Each document, or piece of one, with True if it is held out; in the order of the corpus.

    Args:
        documents: the corpus; the first ENOUGH / fraction are kept in memory.
        fraction: share that is held out, 0 … 1.
    """
    stream = iter(documents)
    if fraction == 0:
        yield from ((document, False) for document in stream)
        return
    first = list(islice(stream, math.ceil(ENOUGH / fraction)))
    rest = list(islice(stream, 1))
    if rest:
        yield from ((document, held_out(document.id, fraction)) for document in chain(first, rest, stream))
    else:
        for document in first:
            yield from _cut(document, fraction)


def _cut(document: Document, fraction: float) -> Iterator[tuple[Document, bool]]:
    """The beginning and the held-out end of a document, at the end of a line where one is near."""
    text = document.text
    at = round(len(text) * (1 - fraction))
    line_end = text.rfind("\n", at - len(text) // 100, at) + 1
    at = line_end or at
    if text[:at]:
        yield Document(document.id, document.location, text[:at]), False
    if text[at:]:
        yield Document(f"{document.id}#end", document.location, text[at:]), True
