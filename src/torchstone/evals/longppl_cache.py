"""What an evaluator says of a text, kept: losses, key tokens and their characters, bound to the text by hash.

The evaluator is the costly part of LongPPL and says the same of a text every time, so what it says is kept once per (text,
evaluator, its ids, trunc_len, stride, α, β) and used for any number of evaluated models. A file is named by the hash of all of
these and holds them again: one that was renamed, copied or damaged is refused. Losses are kept as they are, so that results
from the cache are bit for bit those without it.

The other form is a text file of intervals, one line per document:

    5f2c…  [11, 18];[40, 44]            text hash, two spaces, intervals of characters

Lines of published sets have no hash; those are only checked to lie inside the text.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from torchstone.errors import ConfigError, DataError
from torchstone.evals.longppl_keys import (
    Intervals,
    format_intervals,
    key_intervals,
    key_tokens,
    near_threshold,
    parse_intervals,
)
from torchstone.evals.longppl_scorer import Scorer, full_losses, short_losses
from torchstone.objectives.long_context_windows import check_windows
from torchstone.storage.atomic import atomic_write
from torchstone.storage.hashing import bytes_hash, fingerprint_of

_FORMAT = 1
_LINE = re.compile(r"(?:([0-9a-f]{32})(?: {2}|$))?(.*)")


@dataclass(frozen=True)
class KeyRule:
    """What makes a token key.

    Attributes:
        trunc_len, stride: K and S of the windows.
        alpha, beta: thresholds of the long-short difference and of the log-likelihood.
        bos_in_windows: put the special tokens before a text before every window, too; the published code does not.
    """

    trunc_len: int = 4096
    stride: int = 1024
    alpha: float = 2.0
    beta: float = -2.0
    bos_in_windows: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for windows without tokens and thresholds that are no numbers."""
        check_windows(self.trunc_len, self.stride)
        for name in ("alpha", "beta"):
            if not np.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} was given as {getattr(self, name)}; give a finite number of nats.")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the evaluator says of one text.

    Attributes:
        ids, spans: of the evaluator's tokens, special tokens included.
        full_t, short_t: fp32 losses; nan where there is none.
        key_t: bool, the key tokens.
        intervals: their characters.
        near: tokens that rounding may decide.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    full_t: NDArray[np.float32]
    short_t: NDArray[np.float32]
    key_t: NDArray[np.bool_]
    intervals: Intervals
    near: int

    @property
    def difference_t(self) -> NDArray[np.float32]:
        """Long-short difference in nats; nan where a token is not scored."""
        return np.asarray(self.short_t - self.full_t)


def evidence_of(
    text: str, evaluator: Scorer, rule: KeyRule, document: int, cache: Path | None, identity: str
) -> Evidence:
    """Losses and key tokens of one text, from the cache where they are there.

    Args:
        text: the document.
        evaluator: the model that judges.
        rule: windows and thresholds.
        document: its number, for messages.
        cache: folder of kept files, or None.
        identity: of the evaluator, where there is a cache.

    Raises:
        DataError: a text too short or too long, offsets that the tokenizer does not have, or a kept file that belongs to
            something else.
    """
    ids, spans = evaluator.encoded(text, True)
    if len(ids) <= rule.trunc_len:
        raise DataError(
            f"document {document} has {len(ids):,} tokens; LongPPL needs more than trunc_len = {rule.trunc_len}. Give longer "
            "texts, or a shorter trunc_len."
        )
    if evaluator.max_length is not None and len(ids) > evaluator.max_length:
        raise DataError(
            f"document {document} has {len(ids):,} tokens and the evaluator {evaluator.name} reads at most "
            f"{evaluator.max_length:,}, so its loss with the full context is not known; give shorter texts, or another evaluator."
        )
    if cache is None:
        return judged(*_losses(evaluator, ids, spans, rule), ids, spans, rule)
    header = _header(text, ids, spans, rule, identity)
    path = Path(cache) / f"{fingerprint_of(header)}.npz"
    if path.exists():
        return judged(*_read(path, header, len(ids)), ids, spans, rule)
    losses = _losses(evaluator, ids, spans, rule)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, header=json.dumps(header), full=losses[0], short=losses[1])
    atomic_write(path, buffer.getvalue())
    return judged(*losses, ids, spans, rule)


def _losses(
    evaluator: Scorer, ids: Sequence[int], spans: Sequence[tuple[int, int]], rule: KeyRule
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    first: list[int] = []
    if rule.bos_in_windows:
        count = next((at for at, (start, end) in enumerate(spans) if end > start), 0)
        first = list(ids[:count])
    return full_losses(evaluator, ids), short_losses(evaluator, ids, rule.trunc_len, rule.stride, first)


def judged(
    full_t: NDArray[np.float32],
    short_t: NDArray[np.float32],
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    rule: KeyRule,
) -> Evidence:
    """Key tokens of losses."""
    key_t = key_tokens(full_t, short_t, rule.alpha, rule.beta)
    near = near_threshold(full_t, short_t, rule.alpha, rule.beta)
    return Evidence(tuple(ids), tuple(spans), full_t, short_t, key_t, key_intervals(key_t, spans), near)


def _header(
    text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]], rule: KeyRule, identity: str
) -> dict[str, Any]:
    tokens = np.array([(token, *span) for token, span in zip(ids, spans, strict=True)], dtype=np.int64)
    return {
        "format": _FORMAT,
        "text": text_hash(text),
        "evaluator": identity,
        "tokens": bytes_hash(tokens.tobytes()),
        **asdict(rule),
    }


def _read(path: Path, header: dict[str, Any], length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            theirs = json.loads(str(stored["header"]))
            losses = stored["full"], stored["short"]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(
            f"{path} holds no key tokens that can be read ({error}); remove it, and they are found anew."
        ) from error
    differing = [name for name in header if theirs.get(name) != header[name]]
    if differing:
        raise DataError(
            f"{path} holds key tokens that were found for another {differing[0]}; files of this folder must not be "
            "renamed or copied over one another. Remove it, and they are found anew."
        )
    if any(one_t.shape != (length,) or one_t.dtype != np.float32 for one_t in losses):
        raise DataError(
            f"{path} holds losses of another number of tokens than {length}; remove it, and they are found anew."
        )
    return losses


def text_hash(text: str) -> str:
    """What binds intervals to a text."""
    return bytes_hash(text.encode("utf-8", "surrogatepass"))


def write_intervals(path: str | Path, texts: Sequence[str], intervals: Sequence[Intervals]) -> None:
    """A file of intervals, a line for each text, with the text's hash."""
    pairs = zip(texts, intervals, strict=True)
    lines = [f"{text_hash(text)}  {format_intervals(found)}\n" for text, found in pairs]
    atomic_write(path, "".join(lines))


def read_intervals(path: str | Path, texts: Sequence[str]) -> list[Intervals]:
    """Intervals of texts, from a file of `write_intervals` or of lines `[a, b];[c, d]`.

    Raises:
        DataError: the file cannot be read, has another number of lines, or is of other texts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the intervals {path} cannot be read ({error}); give a file with a line for each text."
        ) from error
    lines = lines[:-1] if lines[-1] == "" else lines
    if len(lines) != len(texts):
        raise DataError(
            f"{path} has {len(lines)} lines of intervals and there are {len(texts)} texts; give a line for each text."
        )
    found = []
    for number, (line, text) in enumerate(zip(lines, texts, strict=True)):
        where = f"{path}, line {number + 1},"
        match = _LINE.fullmatch(line.strip())
        stored, rest = (None, line) if match is None else match.groups()
        if stored is not None and stored != text_hash(text):
            raise DataError(
                f"{where} holds intervals that were found for another text than document {number}; give the texts that they were "
                "found for, in the same order, or find the key tokens anew."
            )
        found.append(parse_intervals(rest, len(text), where))
    return found
