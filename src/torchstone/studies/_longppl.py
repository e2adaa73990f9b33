"""LongPPL's study without training: a language with far copies, readers of limited sight, and ways to choose tokens.

A document is a permutation of all tokens, then Markov text in which runs of the permutation are copied. A reader predicts the
next token from its table of the Markov text, and from the latest earlier place where its last two tokens stood together, if that
is within its window:

    p(v | x) = (1 − λ) · softmax(τ · log P[x_t])_v + λ · [v followed there]          λ = 0.8 where there is such a place, else 0

τ distorts the table, which changes the loss of nearly every token, and the window decides which copies are seen. So perplexity
measures τ and long-context ability is the window, by construction. The benchmark is the share of copied tokens, known to the
generator, that a reader predicts with a loss below 0.7 nats, on documents of their own.

Shapes: n documents · t tokens · v vocabulary · m readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from torchstone.evals.longppl_keys import key_tokens
from torchstone.evals.longppl_scorer import full_losses, scorer_of, short_losses

VOCABULARY, RUN, STARTS = 64, 6, 0.025
TRUST = 0.8  # λ
SOLVED = 0.7  # nats
FULL = 10**6  # a window that is no limit
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Documents:
    """Rows of tokens, and which of them are copies that can be told from their last two tokens."""

    tokens_nt: NDArray[np.int64]
    copied_nt: NDArray[np.bool_]


def language(seed: int) -> Numbers:
    """log P of the Markov text, [v, v]."""
    logits_vv = np.random.default_rng([seed, 1]).normal(0, 2.0, (VOCABULARY, VOCABULARY))
    return np.asarray(logits_vv - np.logaddexp.reduce(logits_vv, axis=1, keepdims=True))


def documents(log_p_vv: Numbers, seed: int, count: int, length: int) -> Documents:
    """Documents of the language."""
    draw = np.random.default_rng([seed, 2])
    steps_vv = np.exp(log_p_vv).cumsum(axis=1)
    tokens_nt = np.zeros((count, length), dtype=np.int64)
    copied_nt = np.zeros((count, length), dtype=np.bool_)
    for tokens_t, copied_t in zip(tokens_nt, copied_nt, strict=True):
        tokens_t[:VOCABULARY] = draw.permutation(VOCABULARY)
        at = VOCABULARY
        while at < length:
            if draw.random() < STARTS:
                start, size = int(draw.integers(VOCABULARY - RUN)), min(RUN, length - at)
                tokens_t[at : at + size] = tokens_t[start : start + size]
                copied_t[at + 2 : at + size] = True
                at += size
            else:
                found = int(np.searchsorted(steps_vv[tokens_t[at - 1]], draw.random()))
                tokens_t[at] = min(found, VOCABULARY - 1)
                at += 1
    return Documents(tokens_nt, copied_nt)


@lru_cache(maxsize=4096)
def _matches(row: bytes) -> tuple[Numbers, NDArray[np.int64]]:
    """For each token how far back its pair with the token before last stood, and what followed there (inf, 0: nowhere)."""
    tokens = np.frombuffer(row, dtype=np.int64).tolist()
    distance_t, follower_t = np.full(len(tokens), np.inf), np.zeros(len(tokens), dtype=np.int64)
    latest: dict[tuple[int, int], int] = {}
    for at in range(1, len(tokens)):
        pair = tokens[at - 1], tokens[at]
        if pair in latest:
            distance_t[at], follower_t[at] = at - latest[pair], tokens[latest[pair] + 1]
        latest[pair] = at
    return distance_t, follower_t


class Reader:
    """ids [b, t] → log-probabilities [b, t, v], as LongPPL takes them.

    Args:
        log_p_vv: of the Markov text.
        window: tokens that it sees.
        sharpness: τ.
    """

    def __init__(self, log_p_vv: Numbers, window: int, sharpness: float = 1.0) -> None:
        table_vv = torch.tensor(sharpness * log_p_vv, dtype=torch.float32).softmax(-1)
        self.table_vv, self.window, self.sharpness = table_vv, window, sharpness

    def __call__(self, tokens_bt: Tensor) -> Tensor:
        found = [_matches(row_t.numpy().tobytes()) for row_t in tokens_bt.contiguous()]
        distance_bt = torch.tensor(np.stack([distance for distance, _ in found]))
        follower_bt = torch.tensor(np.stack([follower for _, follower in found]))
        trust_bt1 = (TRUST * (distance_bt <= self.window - 2).float())[..., None]
        copied_btv = torch.nn.functional.one_hot(follower_bt, VOCABULARY)
        return ((1 - trust_bt1) * self.table_vv[tokens_bt] + trust_bt1 * copied_btv).clamp_min(1e-20).log()


def readers(log_p_vv: Numbers, seed: int, count: int, length: int) -> list[Reader]:
    """Readers whose windows are log-uniform from 40 tokens to the document, independently of their tables."""
    draw = np.random.default_rng([seed, 3])
    windows = np.exp(draw.uniform(np.log(40), np.log(length), count)).round().astype(int)
    return [Reader(log_p_vv, int(w), float(t)) for w, t in zip(windows, draw.uniform(0.15, 1.2, count), strict=True)]


def losses(reader: Reader, tokens_nt: NDArray[np.int64]) -> NDArray[np.float32]:
    """Losses of all tokens, [n, t]; nan for the first."""
    scorer = scorer_of(reader, tokenizer=_Tokens())
    return np.stack([full_losses(scorer, tokens_t.tolist()) for tokens_t in tokens_nt])


def short(reader: Reader, tokens_nt: NDArray[np.int64], trunc_len: int, stride: int) -> NDArray[np.float32]:
    """Short losses of all tokens, [n, t]; nan where there is none."""
    scorer = scorer_of(reader, tokenizer=_Tokens())
    return np.stack([short_losses(scorer, tokens_t.tolist(), trunc_len, stride) for tokens_t in tokens_nt])


class _Tokens:
    """The documents are tokens already; readers need no text."""

    def spans(self, text: str, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        return [], []


@dataclass(frozen=True)
class Bench:
    """All that the arms of one seed share.

    Attributes:
        losses_mnt: of every reader on the scored documents.
        accuracy_m: of every reader on the benchmark.
        full_nt, short_nt: of the evaluator.
    """

    text: Documents
    losses_mnt: NDArray[np.float32]
    accuracy_m: Numbers
    full_nt: NDArray[np.float32]
    short_nt: NDArray[np.float32]


@lru_cache(maxsize=2)
def _world(seed: int, models: int, count: int, length: int) -> tuple[Numbers, Documents, list[Reader], Any, Numbers]:
    """Language, documents, readers, their losses and their accuracy."""
    log_p_vv = language(seed)
    text, test = documents(log_p_vv, seed, count, length), documents(log_p_vv, seed + 10**6, count, length)
    found = readers(log_p_vv, seed, models, length)
    accuracy = [float((losses(one, test.tokens_nt)[test.copied_nt] < SOLVED).mean()) for one in found]
    return log_p_vv, text, found, np.stack([losses(one, text.tokens_nt) for one in found]), np.array(accuracy)


def bench(seed: int, settings: Mapping[str, Any], window: int = FULL, sharpness: float = 1.0) -> Bench:
    """One seed with an evaluator of some window and sharpness."""
    log_p_vv, text, _, losses_mnt, accuracy_m = _world(
        seed, settings["models"], settings["documents"], settings["length"]
    )
    judge = Reader(log_p_vv, window, sharpness)
    short_nt = short(judge, text.tokens_nt, settings["trunc_len"], settings["stride"])
    return Bench(text, losses_mnt, accuracy_m, losses(judge, text.tokens_nt), short_nt)


def chosen(found: Bench, rule: str, settings: Mapping[str, Any], seed: int) -> NDArray[np.bool_]:
    """The tokens whose losses count, [n, t], by a rule.

    `key` are the key tokens. `random` and `loss` take as many tokens of those that the windows scored: at random, or those of the
    highest loss of the evaluator. `all` are all tokens.
    """
    key_nt = key_tokens(found.full_nt, found.short_nt, settings["alpha"], settings["beta"])
    if rule == "key":
        return key_nt
    if rule == "all":
        return ~np.isnan(found.full_nt)
    pool, count = np.flatnonzero(~np.isnan(found.short_nt)), int(key_nt.sum())
    if rule == "random":
        picked = np.random.default_rng([seed, 4]).choice(pool, count, replace=False)
    else:
        picked = pool[np.argsort(-found.full_nt.ravel()[pool], kind="stable")[:count]]
    mask = np.zeros(key_nt.size, dtype=np.bool_)
    mask[picked] = True
    return mask.reshape(key_nt.shape)


def mean_losses(losses_mnt: NDArray[np.float32], mask_nt: NDArray[np.bool_]) -> Numbers | None:
    """log of each model's perplexity on some tokens, [m]; None without tokens."""
    return losses_mnt[:, mask_nt].astype(np.float64).mean(axis=1) if mask_nt.any() else None


def correlation(values_m: Numbers | None, accuracy_m: Numbers) -> float:
    """Pearson's r; 0 where there is nothing to correlate."""
    if values_m is None or np.ptp(values_m) == 0 or np.ptp(accuracy_m) == 0:
        return 0.0
    return float(np.corrcoef(values_m, accuracy_m)[0, 1])


def _correlations(one_rm: Numbers, other_rm: Numbers) -> Numbers:
    """Pearson's r of every row; 0 where a row does not vary."""
    one_rm, other_rm = (x_rm - x_rm.mean(axis=1, keepdims=True) for x_rm in (one_rm, other_rm))
    scale_r = np.sqrt((one_rm**2).sum(axis=1) * (other_rm**2).sum(axis=1))
    return np.asarray((one_rm * other_rm).sum(axis=1) / np.where(scale_r == 0, 1.0, scale_r))


def measure(rule: str, evaluator: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Correlations of one way to choose tokens, and the numbers behind them."""
    found = bench(seed, settings, **evaluator)
    mask_nt = chosen(found, rule, settings, seed)
    values_m = mean_losses(found.losses_mnt, mask_nt)
    plain_m = mean_losses(found.losses_mnt, chosen(found, "all", settings, seed))
    r = correlation(values_m, found.accuracy_m)
    rank = 0.0 if values_m is None else float(stats.spearmanr(values_m, found.accuracy_m).statistic)
    hit = float(found.text.copied_nt[mask_nt].mean()) if mask_nt.any() else 0.0
    return {
        "metrics": {
            "correlation": r,
            "size": abs(r),
            "spearman": rank if np.isfinite(rank) else 0.0,
            "share": float(mask_nt.mean()),
            "copies": hit,
        },
        "values": [] if values_m is None else values_m.tolist(),
        "accuracy": found.accuracy_m.tolist(),
        "difference": _difference(values_m, plain_m, found.accuracy_m, seed),
    }


def _difference(values_m: Numbers | None, plain_m: Numbers | None, accuracy_m: Numbers, seed: int) -> list[float]:
    """95 % interval over models of the correlation minus that of perplexity, by a bootstrap of the models."""
    if values_m is None or plain_m is None:
        return []
    draw = np.random.default_rng([seed, 5])
    picks = draw.integers(len(accuracy_m), size=(2000, len(accuracy_m)))
    found = _correlations(values_m[picks], accuracy_m[picks]) - _correlations(plain_m[picks], accuracy_m[picks])
    return [float(value) for value in np.quantile(found, [0.025, 0.975])]


def robustness(settings: Mapping[str, Any], seed: int, sweep: Mapping[str, Sequence[float]]) -> list[list[float]]:
    """Rows (trunc_len, α, β, correlation, share of tokens) over all settings of a sweep."""
    rows = []
    for trunc_len in sweep["trunc_len"]:
        found = bench(seed, {**settings, "trunc_len": int(trunc_len)})
        for alpha in sweep["alpha"]:
            for beta in sweep["beta"]:
                key_nt = key_tokens(found.full_nt, found.short_nt, alpha, beta)
                r = correlation(mean_losses(found.losses_mnt, key_nt), found.accuracy_m)
                rows.append([float(trunc_len), float(alpha), float(beta), r, float(key_nt.mean())])
    return rows
