"""Texts for analyses: files of the user, or the standard library of the running Python; and rows of tokens from them.

    texts = load_texts(["essays.txt", "pages.jsonl"])          # or load_texts([])
    tokens_nt = token_rows(subject, texts, length=512, count=16)

Every row is one stretch of one text. Texts are not packed together, because attention across a document boundary would
count as long-range attention.

Shapes: n rows · t tokens.

Pitfall: special tokens are left out, so a model that expects a first token (BOS) sees text from its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchstone.data.files import FilesConfig
from torchstone.data.stdlib import StdlibConfig
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError

PLAIN = (".md", ".rst", ".py", ".tex", ".html")  # read as they are, beside the formats of training data


def load_texts(sources: Sequence[str | Path]) -> list[str]:
    """Texts of files; none given: the standard library of the running Python.

    Args:
        sources: paths, globs or URLs: what training reads (.txt, .jsonl with a field `text`, .parquet, compressed or not;
            see `torchstone.data.rows`), and other plain text such as .md, one text a file.

    Raises:
        DataError: an unknown ending, a file that cannot be read, a bad row (named), or an empty text.
    """
    if not sources:
        return [document.text for document in StdlibConfig().build().documents()]
    return [text for source in sources for text in _texts_of(source)]


def token_rows(
    subject: Subject, texts: Sequence[str], length: int, count: int | None = None, *, beyond_context: bool = False
) -> Tensor:
    """Rows of `length` tokens, int64 [n, t] on the subject's device, each from one text.

    The first rows are the beginnings of different texts, then come their second stretches, and so on, so that few rows
    are still many texts.

    Args:
        subject: encodes the texts.
        texts: what `load_texts` gives.
        length: tokens of a row.
        count: rows wanted; None takes all.
        beyond_context: accept rows longer than the model's context.

    Raises:
        ConfigError: a length or count that is no positive number, or a length beyond the model's context.
        DataError: no text is long enough, or there are fewer rows than wanted; both numbers are named.
    """
    _check_length(subject, length, count, beyond_context)
    stretches: list[list[list[int]]] = []
    longest = 0
    for text in texts:
        tokens = subject.encode(text)
        longest = max(longest, len(tokens))
        stretches.append([tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)])
        if count is not None and sum(1 for rows in stretches if rows) >= count:
            break
    if not any(stretches):
        raise DataError(
            f"text too short: needs {length} tokens in one text, the longest of {len(texts)} has {longest}."
        )
    depth = max(len(rows) for rows in stretches)
    ordered = [rows[i] for i in range(depth) for rows in stretches if i < len(rows)]
    if count is not None and len(ordered) < count:
        raise DataError(
            f"text too short: needs {count} rows of {length} tokens, the {len(texts)} texts have {len(ordered)}; give "
            "more text, fewer rows or a shorter length."
        )
    return torch.tensor(ordered[:count], dtype=torch.long, device=subject.device)


def _check_length(subject: Subject, length: int, count: int | None, beyond_context: bool) -> None:
    for what, value in (("length", length), ("count", count)):
        if value is not None and value < 1:
            raise ConfigError(f"{what} was given as {value}; it must be at least 1.")
    if not beyond_context and subject.max_length is not None and length > subject.max_length:
        raise ConfigError(
            f"rows of {length} tokens were asked for and {subject.name} reads at most {subject.max_length}; ask for a "
            "shorter length."
        )


def _texts_of(source: str | Path) -> list[str]:
    path = Path(source)
    if path.suffix.lower() not in PLAIN:
        return [document.text for document in FilesConfig(paths=str(source)).build().documents()]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); give a readable text file.") from error
    if not text.strip():
        raise DataError(f"{path} is an empty text; remove it.")
    return [text]
