"""Documents and cached hidden states of a rank sweep.

Whole documents are held out. They are taken in the order of their texts' hashes, so that neither the order in which they are
given nor repetitions matter, and no more of them are encoded than the tokens need. Every document is cut into rows of at most
`length` tokens; each row is a context of its own, and rows of equal length go through the model together.

Shapes: n tokens with a target · d width · v vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchstone.diagnose.subject import Subject, as_tokens
from torchstone.errors import ConfigError, DataError
from torchstone.objectives.next_token import chunked_scores
from torchstone.storage.hashing import bytes_hash, fingerprint_of

ROWS_AT_ONCE = 8
ENOUGH, SPARE = 100, 2  # documents, and times the tokens asked for, after which no more documents are encoded
SAME = 2e-3  # relative difference between W h and the model's own losses that rounding explains
Rows = list[tuple[int, list[int]]]  # document, tokens


@dataclass(frozen=True)
class Documents:
    """Rows of training and held-out documents; numbers count each side's own documents from 0."""

    train: Rows
    held_out: Rows
    length: int

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token."""
        return fingerprint_of([self.train, self.held_out, self.length])

    def describe(self) -> str:
        """One line of sizes."""
        count = {side: sum(len(row) - 1 for _, row in rows) for side, rows in (("t", self.train), ("h", self.held_out))}
        documents = len({document for document, _ in self.held_out})
        return f"{count['t']} tokens to train heads on, {count['h']} held out in {documents} documents."


@dataclass(frozen=True, eq=False)
class Cached:
    """States after the final norm, fp16 [n, d], with the next token of each and the document that it is from."""

    states_nd: Tensor
    targets_n: Tensor
    document_n: Tensor


def split_documents(subject: Subject, texts: Sequence[str], length: int, tokens: int, held_out: float) -> Documents:
    """Encode texts and hold out about the share `held_out` of them, at least one.

    Raises:
        ConfigError: settings outside their range.
        DataError: fewer than two documents of two tokens or more.
    """
    if length < 2 or tokens < 2 or not 0 < held_out < 1:
        raise ConfigError(
            f"length {length}, tokens {tokens} and held_out {held_out:g}: the first two are at least 2, the last is above 0 "
            "and below 1."
        )
    limit = min(length, subject.max_length or length)
    ranked = sorted(set(texts), key=lambda text: bytes_hash(text.encode("utf-8", "surrogatepass")))
    encoded: list[list[int]] = []
    for text in ranked:
        row = subject.encode(text)
        if len(row) > 1:
            encoded.append(row)
        if len(encoded) > ENOUGH and sum(map(len, encoded)) > SPARE * tokens:
            break
    if len(encoded) < 2:
        raise DataError(
            f"a rank sweep holds out whole documents and needs at least 2 of 2 tokens or more; {len(encoded)} were given."
        )
    kept = max(1, math.ceil(held_out * len(encoded)))
    sides = encoded[:kept], encoded[kept:]
    shares = max(2, math.ceil(tokens * held_out)), tokens
    held, train = (_rows(side, limit, share) for side, share in zip(sides, shares, strict=True))
    return Documents(train, held, limit)


def _rows(documents: Sequence[Sequence[int]], length: int, tokens: int) -> Rows:
    """Rows of documents in turn (first rows of all, then second ones), until there are enough tokens."""
    rows: Rows = []
    count, start = 0, 0
    longest = max(len(document) for document in documents)
    while start < longest - 1 and count < tokens:
        for number, document in enumerate(documents):
            row = list(document[start : start + length])
            if len(row) > 1 and count < tokens:
                rows.append((number, row))
                count += len(row) - 1
        start += length
    return rows


@torch.no_grad()
def cache_states(subject: Subject, rows: Rows, length: int, weight_vd: Tensor) -> Cached:
    """Run the model once over all rows.

    Raises:
        ConfigError: W h does not give the model's own losses (a bias, a soft cap, a scale).
        DataError: states that fp16 cannot hold, or a token that the head does not know.
    """
    by_length: dict[int, Rows] = defaultdict(list)
    for document, row in rows:
        by_length[len(row)].append((document, row))
    states: list[Tensor] = []
    targets: list[Tensor] = []
    documents: list[Tensor] = []
    for size, group in sorted(by_length.items(), reverse=True):
        for start in range(0, len(group), ROWS_AT_ONCE):
            batch = group[start : start + ROWS_AT_ONCE]
            tokens_bt = as_tokens([row for _, row in batch], subject.device)
            if int(tokens_bt.max()) >= weight_vd.shape[0]:
                raise DataError(
                    f"the text holds token {int(tokens_bt.max())}, and the head knows {weight_vd.shape[0]}: tokenizer and "
                    "model do not belong together."
                )
            hidden_nd = subject.hidden_states(tokens_bt)[-1][:, :-1].flatten(0, 1).float()
            if not states:
                _check_head(subject, tokens_bt, hidden_nd, weight_vd)
            states.append(_half(hidden_nd))
            targets.append(tokens_bt[:, 1:].flatten())
            documents.append(torch.tensor([number for number, _ in batch]).repeat_interleave(size - 1))
    numbers = torch.cat(documents).unique(return_inverse=True)[1]
    return Cached(torch.cat(states), torch.cat(targets), numbers)


def _half(hidden_nd: Tensor) -> Tensor:
    half_nd = hidden_nd.half()
    if not bool(half_nd.isfinite().all()):
        raise DataError(
            f"hidden states reach {float(hidden_nd.abs().max()):.3g}, and fp16 holds up to 65504: this model's states cannot "
            "be cached."
        )
    return half_nd


def _check_head(subject: Subject, tokens_bt: Tensor, hidden_nd: Tensor, weight_vd: Tensor) -> None:
    own_n = subject.losses(tokens_bt).flatten().double().cpu()
    ours_n = chunked_scores(hidden_nd, weight_vd, tokens_bt[:, 1:].flatten())[0].double().cpu()
    if not torch.allclose(own_n, ours_n, rtol=SAME, atol=SAME):
        raise ConfigError(
            f"the output matrix times the hidden state gives a mean loss of {float(ours_n.mean()):.4f}, and the model itself "
            f"{float(own_n.mean()):.4f}: its head is more than a matrix (a bias, a soft cap, a scale), which a rank sweep "
            "cannot replace."
        )
