"""Documents and cached hidden states of a rank sweep.

Whole documents are held out. They are taken in the order of their texts' hashes, so that neither the order in which they are
given nor repetitions matter, and no more of them are encoded than the tokens need. Every document is cut into rows of at most
`length` tokens; each row is a context of its own, begins with the model's first tokens (BOS) where it has them, and goes through
the model together with rows of equal length.

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

from torchstone.diagnose.adapters.losses import first_not_finite
from torchstone.diagnose.subject import Subject, as_tokens
from torchstone.errors import ConfigError, DataError
from torchstone.storage.hashing import bytes_hash, fingerprint_of

ROWS_AT_ONCE = 8
ENOUGH, SPARE = 100, 2  # documents, and times the tokens asked for, after which no more documents are encoded
CHECKED = 64  # tokens on which W h is held to the model's own logits
SAME = 2e-3  # relative difference between both that the order of fp32 sums explains; half precision rounds on top
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
        ConfigError: settings outside their range, or rows that the model's first tokens fill.
        DataError: fewer than two documents of two tokens or more.
    """
    if length < 2 or tokens < 2 or not 0 < held_out < 1:
        raise ConfigError(
            f"length {length}, tokens {tokens} and held_out {held_out:g}: the first two are at least 2, the last is above 0 "
            "and below 1."
        )
    limit, first = min(length, subject.max_length or length), subject.first_tokens()
    if limit <= len(first):
        raise ConfigError(
            f"rows of {limit} tokens leave no room for text after the {len(first)} special tokens that {subject.name} starts "
            "with; give a longer length."
        )
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
    held, train = (_rows(side, first, limit, share) for side, share in zip(sides, shares, strict=True))
    return Documents(train, held, limit)


def _rows(documents: Sequence[Sequence[int]], first: list[int], length: int, tokens: int) -> Rows:
    """Rows of documents in turn (first rows of all, then second ones), until there are enough tokens."""
    rows: Rows = []
    count, room = 0, length - len(first)
    for start in range(0, max(len(document) for document in documents), room):
        if count >= tokens:
            break
        for number, document in enumerate(documents):
            row = [*first, *document[start : start + room]]
            if start < len(document) and len(row) > 1 and count < tokens:
                rows.append((number, row))
                count += len(row) - 1
    return rows


@torch.no_grad()
def cache_states(subject: Subject, rows: Rows, length: int, weight_vd: Tensor) -> Cached:
    """Run the model once over all rows.

    Raises:
        ConfigError: W h does not give the model's own logits (a bias, a soft cap, a scale).
        DataError: losses or states that are not finite, states that fp16 cannot hold, or a token that the head does not know.
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
            if not states:
                _check_head(subject, tokens_bt[:1, :CHECKED], weight_vd)
            states.append(_half(subject.hidden_states(tokens_bt)))
            targets.append(tokens_bt[:, 1:].flatten())
            documents.append(torch.tensor([number for number, _ in batch]).repeat_interleave(size - 1))
    numbers = torch.cat(documents).unique(return_inverse=True)[1]
    return Cached(torch.cat(states), torch.cat(targets), numbers)


def _half(layers: Sequence[Tensor]) -> Tensor:
    """The final ones of a batch's states in fp16 [n, d], without every row's last."""
    hidden_nd = layers[-1][:, :-1].flatten(0, 1)
    if not bool(hidden_nd.isfinite().all()):
        raise DataError(
            f"hidden states are NaN or infinite; what is not finite first is {first_not_finite(layers)}. Load the model in "
            "float32, or look for damaged weights there."
        )
    half_nd = hidden_nd.half()
    if not bool(half_nd.isfinite().all()):
        raise DataError(
            f"hidden states reach {float(hidden_nd.abs().max()):.3g}, and fp16 holds up to 65504: this model's states cannot "
            "be cached."
        )
    return half_nd


def _check_head(subject: Subject, tokens_bt: Tensor, weight_vd: Tensor) -> None:
    """Hold W h, computed in the model's own type, to the model's logits; padded rows of its head are left out.

    Both are compared as softmax sees them, without every token's mean. The type's rounding is that of the whole logits, though,
    which may have a large common part.
    """
    subject.losses(tokens_bt)  # says where, if they are not finite
    hidden_btd = subject.hidden_states(tokens_bt)[-1]
    own_btv = subject.logits(tokens_bt)[..., : weight_vd.shape[0]].float()
    ours_btv = (hidden_btd @ weight_vd.to(hidden_btd.dtype).T).float()
    rounding = torch.finfo(hidden_btd.dtype).eps / 2 * float(own_btv.norm())
    own_btv, ours_btv = (logits_btv - logits_btv.mean(-1, keepdim=True) for logits_btv in (own_btv, ours_btv))
    apart, whole = float((ours_btv - own_btv).norm()), float(own_btv.norm())
    if apart > SAME * whole + rounding:
        raise ConfigError(
            f"the output matrix times the hidden state differs from the model's own logits, whose norm is {whole:.4g}, by "
            f"{apart:.4g}: its head is more than a matrix (a bias, a soft cap, a scale), which a rank sweep cannot replace."
        )
