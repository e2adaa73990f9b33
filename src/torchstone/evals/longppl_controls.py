"""Controls of LongPPL: do key tokens lose their advantage without the far context of their own document?

Some windows of every document are read by the evaluated model three times, and the same tokens scored:

    own       the whole document before the token                 what LongPPL is made of
    foreign   another document's tokens in place of all that stands before the window, which keeps its place in the text
    near      the window alone, trunc_len to trunc_len + stride - 1 tokens

Key tokens that need their document lose as much with foreign as with near context; other tokens of the same windows lose little.
A model that is better on key tokens for any other reason than far context keeps its advantage.

Windows are those of the published rule, counted in the evaluated model's tokens. Of each document the two with the
most key tokens are read, which costs no more than two passes over it and two windows.

Shapes: t tokens of a text · k scored tokens.

Pitfall: a document's stranger is the next one, and those after it where it is too short; where all others together are too short,
the context is as long as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from torchstone.evals.longppl import Document, LongPPL
from torchstone.evals.longppl_scorer import Scorer
from torchstone.objectives.long_context_windows import window_starts
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.estimate import Estimate

WINDOWS = 2  # of a document


@dataclass(frozen=True, eq=False)
class FarContext:
    """Losses of the same tokens with three contexts.

    Attributes:
        own_k, foreign_k, near_k: fp64 losses.
        key_k: which tokens are key.
        numbers_k: the document of each.
    """

    own_k: NDArray[np.float64]
    foreign_k: NDArray[np.float64]
    near_k: NDArray[np.float64]
    key_k: NDArray[np.bool_]
    numbers_k: NDArray[np.int64]

    def perplexities(self, key: bool) -> tuple[int, float | None, float | None, float | None]:
        """Tokens, and perplexity with own, foreign and near context, of key tokens or of the others."""
        chosen_k = self.key_k == key
        if not chosen_k.any():
            return 0, None, None, None
        own, foreign, near = (math.exp(x_k[chosen_k].mean()) for x_k in (self.own_k, self.foreign_k, self.near_k))
        return int(chosen_k.sum()), own, foreign, near

    def lost(self, key: bool, seed: int = 0) -> Estimate:
        """Mean rise of the loss with foreign far context, of key tokens or of the others, bootstrapped over documents."""
        chosen_k = self.key_k == key
        rise_k = (self.foreign_k - self.own_k)[chosen_k]
        return clustered_estimate(rise_k, self.numbers_k[chosen_k], np.random.default_rng(seed))


def far_context(model: Scorer, texts: Sequence[str], found: LongPPL) -> FarContext | None:
    """The control; None with fewer than two documents, or where no window behind the first has a key token.

    Args:
        model: the evaluated model.
        texts: the documents of `found`.
        found: its LongPPL.
    """
    ids = [model.encoded(text, False)[0] for text in texts]
    rows = []
    for one in found.documents if len(texts) > 1 else ():
        others = _others(ids, one.number)
        for start, end in _windows(one, found.rule.trunc_len, found.rule.stride):
            own_ids, first = ids[one.number][start:end], start + found.rule.trunc_len
            foreign = _losses(model, [*others[max(0, len(others) - start) :], *own_ids], end - first)
            near = _losses(model, own_ids, end - first)
            own = one.losses_t[first - 1 : end - 1].astype(np.float64)
            key = np.isin(np.arange(first - 1, end - 1), one.key_index)
            rows.append((own, foreign, near, key, np.full(len(own), one.number)))
    if not rows:
        return None
    return FarContext(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def _windows(one: Document, trunc_len: int, stride: int) -> list[tuple[int, int]]:
    """The windows with the most key tokens, (start, end); the first has nothing before it and is left out."""
    at_k = one.key_index + 1
    counted = []
    for start in window_starts(one.tokens, trunc_len, stride)[1:]:
        end = min(start + trunc_len + stride, one.tokens)
        counted.append((int(((at_k >= start + trunc_len) & (at_k < end)).sum()), start, end))
    best = sorted((window for window in counted if window[0]), reverse=True)[:WINDOWS]
    return [(start, end) for _, start, end in best]


def _others(ids: Sequence[Sequence[int]], number: int) -> list[int]:
    """Tokens of the other documents, in order; the next one stands last, where its end is nearest."""
    order = [(number + step) % len(ids) for step in range(len(ids) - 1, 0, -1)]
    return [token for other in order for token in ids[other]]


def _losses(model: Scorer, ids: Sequence[int], last: int) -> NDArray[np.float64]:
    ids_1t = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    return model.losses(ids_1t, last)[0].double().cpu().numpy()
