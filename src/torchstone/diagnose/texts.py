"""Texts for analyses: files of the user, or the standard library of the running Python; and rows of tokens from them.

    texts = load_texts(["essays.txt", "pages.jsonl"])          # or load_texts([])
    tokens_nt = token_rows(subject, texts, length=512, count=16)

Every row is one stretch of one text. Texts are not packed together, because attention across a document boundary would
count as long-range attention.

Shapes: n rows · t tokens.

Models such as Llama and Gemma were trained on texts that begin with a special token (BOS). Every row starts with what the
tokenizer itself puts there (`Subject.first_tokens`): it is context, no text, and counts as part of the row's length.

Pitfall: no other special token is added, and rows that are later stretches of a text still begin in its middle.
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

    A row is `subject.first_tokens()`, none for many models, and then text up to its length. The first rows are the beginnings
    of different texts, then come their second stretches, and so on, so that few rows are still many texts.

    Args:
        subject: encodes the texts.
        texts: what `load_texts` gives.
        length: tokens of a row, first tokens included.
        count: rows wanted; None takes all.
        beyond_context: accept rows longer than the model's context.

    Raises:
        ConfigError: a length or count that is no positive number, a length beyond the model's context, or one that leaves no
            room for text.
        DataError: no text is long enough, or there are fewer rows than wanted (both numbers are named); a token that the
            model does not know.
    """
    _check_length(subject, length, count, beyond_context)
    first = subject.first_tokens()
    room = length - len(first)
    if room < 1:
        raise ConfigError(
            f"rows of {length} token(s) were asked for, and {subject.name} starts each with {len(first)} special token(s), which "
            "leaves no room for text; ask for a longer length."
        )
    stretches: list[list[list[int]]] = []
    longest = 0
    for text in texts:
        tokens = subject.encode(text)
        longest = max(longest, len(tokens))
        starts = range(0, len(tokens) - room + 1, room)
        stretches.append([[*first, *tokens[start : start + room]] for start in starts])
        if count is not None and sum(1 for rows in stretches if rows) >= count:
            break
    if not any(stretches):
        raise DataError(f"text too short: needs {room} tokens in one text, the longest of {len(texts)} has {longest}.")
    depth = max(len(rows) for rows in stretches)
    ordered = [rows[i] for i in range(depth) for rows in stretches if i < len(rows)]
    if count is not None and len(ordered) < count:
        raise DataError(
            f"text too short: needs {count} rows of {length} tokens, the {len(texts)} texts have {len(ordered)}; give "
            "more text, fewer rows or a shorter length."
        )
    rows_nt = torch.tensor(ordered[:count], dtype=torch.long)
    _check_known(subject, int(rows_nt.max()))
    return rows_nt.to(subject.device)


def _check_known(subject: Subject, largest: int) -> None:
    """Raise for a token id without an embedding; ids may exceed `vocab_size` where a tokenizer leaves some out."""
    if largest < subject.vocab_size:
        return
    known = int(getattr(subject.embedding(), "num_embeddings", subject.vocab_size))
    if largest >= known:
        raise DataError(
            f"the text holds token {largest}, and {subject.name} knows {known} (0 to {known - 1}): tokenizer and model do not "
            "belong together; give the model's own tokenizer."
        )


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
