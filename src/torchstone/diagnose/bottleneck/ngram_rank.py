"""Rank of the data: how many dimensions do the next-token distributions of frequent contexts need?

    P [c, v] = (counts + α) / row sum,   W* = log P with rows centred (softmax does not see a constant per row),
    π = frequency of the contexts

No head of rank d can give cross-entropy below that of the best logits of rank d. Two figures bound what it loses against P:
cutting W* after d singular values (loose, Eckart and Young), and fitting rank-d logits to the weighted cross-entropy itself
(tight: Adam on two factors). The tail √(Σ_{i>d} σ_i² / Σ σ_i²) is the trend that the bound of arXiv 2404.07647 follows; it
predicts no loss.

Counts of finite text are noisy, and noise has full rank. The control has none but noise: every context keeps its number of
tokens, drawn anew from the frequencies of next tokens regardless of context. Its true rank is 1.

Shapes: c contexts · v next tokens that occur · d rank.

Pitfall: contexts of many tokens, or a large vocabulary, leave few counts per entry; then the control needs as much rank as the
data, and the figure says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchstone.diagnose.bottleneck.critical_rank import critical_rank, power_law
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, PaperFigure, Table

RANKS = (2, 4, 8, 16, 32, 64)
LEARNING_RATE = 0.1  # of Adam on the factors; decays linearly to 0
PAPER = (
    PaperFigure(setting="n-gram matrices of web text", paper="error still large at rank 1000; about 10 000 needed"),
)


@dataclass(frozen=True, eq=False)
class NgramMatrix:
    """Smoothed next-token distributions.

    Attributes:
        prob_cv: fp64, rows sum to 1.
        weight_c: fp64, how often each context occurs; sums to 1.
    """

    prob_cv: Tensor
    weight_c: Tensor

    @cached_property
    def logits_cv(self) -> Tensor:
        """W*: logarithms with every row's mean subtracted."""
        log_cv = self.prob_cv.log()
        return log_cv - log_cv.mean(1, keepdim=True)

    @cached_property
    def decomposition(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ, Vᵀ of W*."""
        u_ck, values_k, v_kv = torch.linalg.svd(self.logits_cv, full_matrices=False)
        return u_ck, values_k, v_kv

    @cached_property
    def weighted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same with rows weighted by √π, and the left factor unweighted again: its cut favours frequent contexts."""
        root_c1 = self.weight_c.clamp(min=1e-12).sqrt().unsqueeze(1)
        u_ck, values_k, v_kv = torch.linalg.svd(root_c1 * self.logits_cv, full_matrices=False)
        return u_ck / root_c1, values_k, v_kv

    @property
    def values_k(self) -> Tensor:
        """σ(W*), largest first."""
        return self.decomposition[1]

    @property
    def entropy(self) -> float:
        """Nats per token: cross-entropy of the distributions themselves."""
        return float(self.weight_c @ torch.special.entr(self.prob_cv).sum(1))

    def gap(self, logits_cv: Tensor) -> float:
        """Cross-entropy of logits minus the entropy: the mean KL divergence, nats."""
        kl_c = (self.prob_cv * (self.prob_cv.log() - logits_cv.double().log_softmax(1))).sum(1)
        return float(self.weight_c @ kl_c)

    def tail(self, rank: int) -> tuple[float, float]:
        """Frobenius norm of what W* loses at a rank, and the same over the norm of W*."""
        lost = float(torch.linalg.vector_norm(self.values_k[rank:]))
        whole = float(torch.linalg.vector_norm(self.values_k))
        return lost, lost / whole if whole > 0 else 0.0

    def truncated(self, rank: int) -> Tensor:
        """The matrix of this rank nearest to W*."""
        u_ck, values_k, v_kv = self.decomposition
        return (u_ck[:, :rank] * values_k[:rank]) @ v_kv[:rank]


def ngram_matrix(counts_cv: Tensor, alpha: float = 0.1) -> NgramMatrix:
    """Distributions from counts, α added to every entry.

    Raises:
        DataError: no counts, negative or non-finite ones, or α not positive (log 0).
    """
    counts_cv = counts_cv.double()
    if counts_cv.dim() != 2 or not counts_cv.isfinite().all() or bool((counts_cv < 0).any()) or not counts_cv.sum() > 0:
        raise DataError(
            f"next-token counts are a matrix of numbers from 0 with at least one above; given: shape "
            f"{list(counts_cv.shape)}, sum {float(counts_cv.sum()):g}."
        )
    if not alpha > 0:
        raise DataError(f"alpha is {alpha:g}; it must be above 0, since the logarithm of a count of 0 does not exist.")
    raised_cv = counts_cv + alpha
    return NgramMatrix(raised_cv / raised_cv.sum(1, keepdim=True), counts_cv.sum(1) / counts_cv.sum())


def count_ngrams(documents: Sequence[Sequence[int]], order: int, top: int) -> NDArray[np.int64]:
    """Counts [c, v] of next tokens after the `top` most frequent contexts of `order` tokens; no n-gram spans two documents.

    Columns are the tokens that follow any of these contexts. Equally frequent contexts are taken in order of their tokens.

    Raises:
        ConfigError: order or top is not positive, or contexts of this order cannot be numbered in 63 bits; what counts for that
            is how many different tokens occur, however large their ids.
        DataError: no document is longer than the context.
    """
    if order < 1 or top < 1:
        raise ConfigError(f"order is {order} and top is {top}; both count something and are at least 1.")
    arrays = [np.asarray(document, dtype=np.int64) for document in documents if len(document) > order]
    if not arrays:
        raise DataError(
            f"no document has more than {order} tokens, so there is no context to count; give longer texts."
        )
    known, token_n = np.unique(np.concatenate(arrays), return_inverse=True)
    base = len(known)
    if base**order >= 2**63:
        raise ConfigError(
            f"order {order} is too long for texts of {base} different tokens; use shorter contexts or a smaller vocabulary."
        )
    codes, following = [], []
    for array in np.split(token_n, np.cumsum([len(array) for array in arrays])[:-1]):
        code = np.zeros(len(array) - order, dtype=np.int64)
        for step in range(order):
            code = code * base + array[step : len(array) - order + step]
        codes.append(code)
        following.append(array[order:])
    code_n, next_n = np.concatenate(codes), np.concatenate(following)
    contexts, number_n, often = np.unique(code_n, return_inverse=True, return_counts=True)
    chosen = np.argsort(-often, kind="stable")[:top]
    place = np.full(len(contexts), -1)
    place[chosen] = np.arange(len(chosen))
    row_n = place[number_n]
    _, column_n = np.unique(next_n[row_n >= 0], return_inverse=True)
    columns = int(column_n.max()) + 1
    flat = np.bincount(row_n[row_n >= 0] * columns + column_n, minlength=len(chosen) * columns)
    return flat.reshape(len(chosen), columns).astype(np.int64)


def noise_counts(counts_cv: NDArray[np.int64], seed: int = 0) -> NDArray[np.int64]:
    """Counts of the same totals per context, drawn from the frequencies of next tokens whatever the context."""
    generator = np.random.default_rng([seed, 2404])
    share_v = counts_cv.sum(0) / counts_cv.sum()
    return np.stack([generator.multinomial(total, share_v) for total in counts_cv.sum(1)])


def fitted_gap(matrix: NgramMatrix, rank: int, steps: int = 300) -> float:
    """Gap of logits of this rank fitted to the weighted cross-entropy, nats: full-batch Adam in fp32 on two factors.

    The start is the cut of `NgramMatrix.weighted`, with the norm of every direction shared between both factors.

    Raises:
        ConfigError: the rank is not between 1 and min(c, v).
    """
    contexts, tokens = matrix.prob_cv.shape
    if not 1 <= rank <= min(contexts, tokens):
        raise ConfigError(f"rank {rank} is not between 1 and min(contexts {contexts}, tokens {tokens}).")
    u_ck, values_k, v_kv = matrix.weighted
    left_cd, right_dv = u_ck[:, :rank].float(), (values_k[:rank, None] * v_kv[:rank]).float()
    ratio_d = (right_dv.norm(dim=1) / left_cd.norm(dim=0).clamp(min=1e-12)).clamp(min=1e-6).sqrt()
    left_cd, right_dv = (left_cd * ratio_d).requires_grad_(), (right_dv / ratio_d[:, None]).requires_grad_()
    optimizer = torch.optim.Adam([left_cd, right_dv], lr=LEARNING_RATE)
    prob_cv, weight_c = matrix.prob_cv.float(), matrix.weight_c.float()
    joint_cv, best = weight_c[:, None] * prob_cv, matrix.gap(left_cd.detach() @ right_dv.detach())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        logits_cv = left_cd @ right_dv
        loss = (weight_c * logits_cv.logsumexp(1)).sum() - (joint_cv * logits_cv).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return min(best, matrix.gap(left_cd.detach() @ right_dv.detach()))


@dataclass(frozen=True)
class RankCurve:
    """Numbers of one matrix by rank; gaps in nats.

    Attributes:
        ranks: as asked for, rising.
        fitted, truncated, tail: one per rank; tail is relative.
        entropy: nats per token.
        contexts, tokens: shape of the matrix.
    """

    ranks: tuple[int, ...]
    fitted: tuple[float, ...]
    truncated: tuple[float, ...]
    tail: tuple[float, ...]
    entropy: float
    contexts: int
    tokens: int

    @property
    def critical(self) -> float | None:
        """Rank at which the fitted gap falls to 0.01 nats."""
        return critical_rank(self.ranks, self.fitted)


def rank_curve(
    counts_cv: NDArray[np.int64], ranks: Sequence[int] = RANKS, alpha: float = 0.1, steps: int = 300
) -> RankCurve:
    """Both gaps and the tail at every rank below min(c, v)."""
    matrix = ngram_matrix(torch.from_numpy(counts_cv), alpha)
    kept = tuple(sorted(rank for rank in set(ranks) if rank < min(counts_cv.shape)))
    return RankCurve(
        ranks=kept,
        fitted=tuple(fitted_gap(matrix, rank, steps) for rank in kept),
        truncated=tuple(matrix.gap(matrix.truncated(rank)) for rank in kept),
        tail=tuple(matrix.tail(rank)[1] for rank in kept),
        entropy=matrix.entropy,
        contexts=counts_cv.shape[0],
        tokens=counts_cv.shape[1],
    )


def ngram_rank_finding(
    subject: Subject | None,
    texts: Sequence[str],
    *,
    order: int = 3,
    top: int = 800,
    alpha: float = 0.1,
    ranks: Sequence[int] = RANKS,
    steps: int = 300,
    most: int = 2_000_000,
    seed: int = 0,
) -> Finding:
    """Rank of the next-token distributions of texts, next to counts without any structure.

    Args:
        subject: whose tokens are counted, and whose width is among the ranks; None (`bytes` on the command line): UTF-8 bytes.
        texts: documents.
        order: tokens of a context.
        top: contexts, the most frequent ones.
        alpha: added to every count.
        ranks: at which to measure; those that the matrix cannot miss are left out.
        steps: of the fit.
        most: characters of text that are counted, from the first document on.
        seed: of the control.

    Raises:
        ConfigError, DataError: see `count_ngrams`.
    """
    used = _first(texts, most)
    documents = [list(text.encode()) if subject is None else subject.encode(text) for text in used]
    counts_cv = count_ngrams(documents, order, top)
    wanted = ranks if subject is None else (*ranks, subject.width)
    ours = rank_curve(counts_cv, wanted, alpha, steps)
    noise = rank_curve(noise_counts(counts_cv, seed), wanted, alpha, steps)
    law = power_law(ours.ranks, ours.fitted)
    return Finding(
        analysis="ngram-rank",
        title="Rank of the data",
        question="How large a rank do the next-token distributions of frequent contexts need?",
        subject="bytes, no model" if subject is None else f"tokens of {subject.describe()}",
        answer=(
            f"Fitted logits lose less than 0.01 nats {_beyond(ours)}; counts without structure {_beyond(noise)}."
            + (f" The gap falls as {law.c:.3g} · rank^-{law.p:.2f}." if law else "")
            + _at_width(ours, subject)
        ),
        control="Counts with the same totals per context, drawn from the overall frequencies: what noise alone needs.",
        tables=(_table(ours, noise),),
        figures=(_figure(ours, noise),),
        paper=PAPER,
        notes=(
            "The truncation gap is an upper trend, no prediction: fitted logits of the same rank lose several times less.",
            f"{len(used)} texts, {sum(map(len, used)):,} characters.",
        ),
    )


def _first(texts: Sequence[str], most: int) -> list[str]:
    """Texts up to a number of characters, the last one cut."""
    if most < 1:
        raise ConfigError(f"most is {most}; give the characters of text to count, at least 1.")
    used: list[str] = []
    for text in texts:
        left = most - sum(map(len, used))
        if left <= 0:
            break
        used.append(text[:left])
    return used


def _at_width(ours: RankCurve, subject: Subject | None) -> str:
    """What the model's own width costs on this data at the least."""
    if subject is None or subject.width not in ours.ranks:
        return ""
    gap = ours.fitted[ours.ranks.index(subject.width)]
    return f" At the model's width of {subject.width} it is {gap:.2g} nats."


def _table(ours: RankCurve, noise: RankCurve) -> Table:
    return Table(
        title="gap by rank",
        columns=("rank", "fitted gap", "truncation gap", "relative tail", "fitted gap of noise"),
        rows=tuple(zip(ours.ranks, ours.fitted, ours.truncated, ours.tail, noise.fitted, strict=True)),
        note=f"Nats beyond the entropy {ours.entropy:.3f}; {ours.contexts} contexts, {ours.tokens} next tokens.",
    )


def _figure(ours: RankCurve, noise: RankCurve) -> Figure:
    curves = {"fitted": ours.fitted, "truncated": ours.truncated, "noise, fitted": noise.fitted}
    return Figure(
        title="Cross-entropy beyond the data's entropy",
        x_label="rank",
        y_label="nats per token",
        log_x=True,
        log_y=True,
        lines=tuple(Line(name=name, x=ours.ranks, y=_positive(values)) for name, values in curves.items()),
    )


def _beyond(curve: RankCurve) -> str:
    if curve.critical is not None:
        return f"from rank {curve.critical:.1f} on"
    if not curve.ranks or curve.fitted[-1] > 0.01:
        return "at none of these ranks"
    return "at every one of these ranks"


def _positive(values: Sequence[float]) -> tuple[float | None, ...]:
    """For a logarithmic axis."""
    return tuple(value if value > 0 else None for value in values)
