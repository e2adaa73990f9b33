"""Which (prefix, suffix) pairs of a row are trained on, and what each should say (Hu et al., arXiv 2410.23506).

A pair (i, j) joins the prefix that ends at token i with the suffix that begins at token j. It counts when

    i ≥ context_length,   gap_min ≤ j − i < gap_max,   and both are in the same document,

where an end token is the left end of the document behind it and the right end of the one before it. Targets are
next = x_{i+1} and prev = x_{j−1}; for neighbours (gap 1) either the end token twice, "nothing in between", or the same formulas,
which then name x_j and x_i.

Pairs are listed by row, then i, then j. Sampling keeps a pair with probability `rate`; pairs that touch an end token are kept
always, because the empty prefix and suffix are such pairs, and so is at least one of every row that has any.

Shapes: b rows · t tokens · n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchstone.models.belief_state import starts

SingleGap = Literal["eos", "next-token"]


@dataclass(frozen=True)
class PairRule:
    """Which pairs count.

    Attributes:
        gap_min, gap_max: gap_min <= j - i < gap_max; None: no upper bound.
        context_length: least index of the last token of a prefix.
        single_gap: targets of neighbours: the end token twice, or the tokens themselves.
        rate: probability of keeping a pair that touches no end token.
    """

    gap_min: int = 1
    gap_max: int | None = None
    context_length: int = 0
    single_gap: SingleGap = "eos"
    rate: float = 1.0

    def per_row(self, length: int) -> int:
        """Pairs of a row of `length` tokens that is one document, before sampling."""
        last = length if self.gap_max is None else self.gap_max
        gaps = (min(length, i + last) - i - self.gap_min for i in range(self.context_length, length))
        return sum(max(0, gap) for gap in gaps)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a batch: row, end of the prefix and begin of the suffix of each, and its targets [n, 2]: next, prev."""

    row_n: Tensor
    prefix_n: Tensor
    suffix_n: Tensor
    targets_n2: Tensor

    def __len__(self) -> int:
        return self.row_n.shape[0]

    def weight_n(self, rows: int) -> Tensor:
        """1 over the number of pairs in each pair's row, fp32: sums to the number of rows that have any."""
        return 1.0 / torch.bincount(self.row_n, minlength=rows).float()[self.row_n]


def valid_pairs(tokens_bt: Tensor, end_token: int, rule: PairRule, documents_bt: Tensor | None = None) -> Tensor:
    """bool [b, t, t]: pairs (i, j) that count, before sampling."""
    number_bt = starts(tokens_bt, end_token, documents_bt).cumsum(1)
    # the document of j as the right end of a suffix: an end token belongs to the one before it
    before_bt = torch.cat([number_bt[:, :1] - 1, number_bt[:, :-1]], dim=1)
    right_bt = torch.where(tokens_bt == end_token, before_bt, number_bt)
    index_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
    gap_tt = index_t[None, :] - index_t[:, None]
    allowed_tt = (gap_tt >= rule.gap_min) & (index_t[:, None] >= rule.context_length)
    if rule.gap_max is not None:
        allowed_tt &= gap_tt < rule.gap_max
    return (number_bt[:, :, None] == right_bt[:, None, :]) & allowed_tt


def rows_with_pairs(tokens_bt: Tensor, end_token: int, rule: PairRule, documents_bt: Tensor | None = None) -> Tensor:
    """bool [b]: rows that have a pair, without making the pairs: one with a gap of gap_min is among them."""
    gap, first = rule.gap_min, rule.context_length
    number_bt = starts(tokens_bt, end_token, documents_bt).cumsum(1)
    before_bt = torch.cat([number_bt[:, :1] - 1, number_bt[:, :-1]], dim=1)
    right_bt = torch.where(tokens_bt == end_token, before_bt, number_bt)
    return (number_bt[:, first:-gap] == right_bt[:, first + gap :]).any(1)


def pairs_of(
    tokens_bt: Tensor,
    end_token: int,
    rule: PairRule,
    documents_bt: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Pairs:
    """The pairs of a batch.

    Args:
        tokens_bt: int64 tokens.
        end_token: id that separates documents.
        rule: which pairs count.
        documents_bt: further document borders, where no end token stands.
        generator: draws what sampling keeps; None: torch's default one on the tokens' device.
    """
    row_n, prefix_n, suffix_n = valid_pairs(tokens_bt, end_token, rule, documents_bt).nonzero(as_tuple=True)
    if rule.rate < 1.0:
        ends_n = (tokens_bt[row_n, prefix_n] == end_token) | (tokens_bt[row_n, suffix_n] == end_token)
        kept_n = _sampled(row_n, ends_n, tokens_bt.shape[0], rule.rate, generator)
        row_n, prefix_n, suffix_n = row_n[kept_n], prefix_n[kept_n], suffix_n[kept_n]
    targets_n2 = torch.stack([tokens_bt[row_n, prefix_n + 1], tokens_bt[row_n, suffix_n - 1]], dim=1)
    if rule.single_gap == "eos" and rule.gap_min == 1:
        targets_n2[suffix_n - prefix_n == 1] = end_token
    return Pairs(row_n, prefix_n, suffix_n, targets_n2)


def _sampled(row_n: Tensor, ends_n: Tensor, rows: int, rate: float, generator: torch.Generator | None) -> Tensor:
    """bool [n]: pairs that are kept; the one with the smallest draw stands for a row of which chance keeps none."""
    device = row_n.device if generator is None else generator.device
    draw_n = torch.rand(len(row_n), generator=generator, device=device).to(row_n.device)
    least_b = torch.full((rows,), 2.0, device=row_n.device).scatter_reduce(0, row_n, draw_n, "amin")
    return ends_n | (draw_n < rate) | (draw_n == least_b[row_n])
