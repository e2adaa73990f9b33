"""LongPPL: perplexity of the tokens that need long context (Fang et al., arXiv 2410.23771).

    LongPPL = exp( mean over key tokens of the evaluated model's −log p(x_i | x_<i) )

An evaluator finds the key tokens: those that it predicts much better with the whole text before them than with a window of
trunc_len tokens (`longppl_keys`). Plain perplexity averages over all tokens, most of which any short context explains.

    found = longppl(texts, "runs/mine", "models/evaluator", trunc_len=256, stride=64, cache="keys")
    found.longppl, found.ppl, found.key_tokens, found.interval, found.documents[0].longppl

The value of several texts weighs every key token alike. A text without key tokens has no LongPPL and counts for perplexity only.

Shapes: t tokens of the evaluated model; `losses_t[j]` is the loss of token j + 1.

Pitfalls
- The evaluator reads texts with its special tokens, the evaluated model without.
- Half-precision models have losses that are off by 0.01 to 0.05; `near` counts the tokens that this may decide.
- trunc_len of half the text or more leaves hardly any key token: watch `warnings`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchstone.errors import ConfigError, DataError
from torchstone.evals.longppl_cache import Evidence, KeyRule, evidence_of, read_intervals
from torchstone.evals.longppl_keys import Intervals, inside
from torchstone.evals.longppl_scorer import Scorer, full_losses, scorer_of
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.estimate import Estimate

LEAST_KEY_TOKENS = 100
LEAST_SHARE, MOST_SHARE = 0.005, 0.3


@dataclass(frozen=True, eq=False)
class Document:
    """One text and what the evaluated model makes of it.

    Attributes:
        number: its place among the texts, from 0.
        spans: characters of the model's tokens.
        losses_t: fp32 [t-1], losses of all tokens but the first.
        key_index: int64, indices into `losses_t` of the key tokens.
        intervals: characters of the evaluator's key tokens.
        evidence: what the evaluator says; None where intervals were given.
    """

    number: int
    spans: tuple[tuple[int, int], ...]
    losses_t: NDArray[np.float32]
    key_index: NDArray[np.int64]
    intervals: Intervals
    evidence: Evidence | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the evaluated model."""
        return len(self.spans)

    @property
    def key_losses(self) -> NDArray[np.float64]:
        """Losses of the key tokens."""
        return self.losses_t[self.key_index].astype(np.float64)

    @property
    def longppl(self) -> float | None:
        """LongPPL; None without key tokens."""
        return _perplexity(self.key_losses)

    @property
    def ppl(self) -> float | None:
        """Plain perplexity; None for a text of one token."""
        return _perplexity(self.losses_t.astype(np.float64))


@dataclass(frozen=True, eq=False)
class LongPPL:
    """LongPPL of texts.

    Attributes:
        documents: one per text.
        rule: windows and thresholds.
        model, evaluator: names.
        notes: what a reader should know of the model's limits.
    """

    documents: tuple[Document, ...]
    rule: KeyRule
    model: str
    evaluator: str
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the evaluated model."""
        return sum(document.tokens for document in self.documents)

    @property
    def key_tokens(self) -> int:
        """Key tokens of the evaluated model."""
        return sum(len(document.key_index) for document in self.documents)

    @property
    def key_share(self) -> float:
        """Share of its tokens that are key."""
        return self.key_tokens / self.tokens

    @property
    def longppl(self) -> float | None:
        """exp of the mean loss of all key tokens; None if there is none."""
        return _perplexity(self._key_losses)

    @property
    def ppl(self) -> float | None:
        """exp of the mean loss of all tokens."""
        return _perplexity(np.concatenate([document.losses_t for document in self.documents]).astype(np.float64))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of LongPPL, bootstrapped over documents; None with fewer than ten that have key tokens."""
        if not self.key_tokens:
            return None
        found = self.over_documents(self._key_losses)
        return None if found.low is None or found.high is None else (math.exp(found.low), math.exp(found.high))

    def over_documents(self, values: NDArray[np.float64], seed: int = 0) -> Estimate:
        """Mean of one number per key token, bootstrapped over documents."""
        numbers = np.concatenate([np.full(len(one.key_index), one.number) for one in self.documents])
        return clustered_estimate(values, numbers, np.random.default_rng(seed))

    @property
    def sufficient(self) -> bool:
        """Whether there are at least 100 key tokens."""
        return self.key_tokens >= LEAST_KEY_TOKENS

    @property
    def near(self) -> int | None:
        """Evaluator's tokens within 0.05 nats of a threshold, which rounding may decide; None where intervals were given."""
        found = [document.evidence.near for document in self.documents if document.evidence is not None]
        return sum(found) if found else None

    @property
    def intervals(self) -> list[Intervals]:
        """Characters of the key tokens of every document, for `write_intervals`."""
        return [document.intervals for document in self.documents]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the value may not say much."""
        found = []
        if not self.sufficient:
            found.append(
                f"insufficient: {self.key_tokens} key tokens, and a value needs at least {LEAST_KEY_TOKENS}; give more or "
                "longer texts."
            )
        if self.key_share < LEAST_SHARE:
            found.append(
                f"only {self.key_share:.2%} of the tokens are key: trunc_len ({self.rule.trunc_len}) is long for these texts, or "
                "little in them needs far context."
            )
        if self.key_share > MOST_SHARE:
            found.append(
                f"{self.key_share:.0%} of the tokens are key: trunc_len ({self.rule.trunc_len}) is so short that near context is "
                "cut off too."
            )
        return (*found, *self.notes)

    @property
    def _key_losses(self) -> NDArray[np.float64]:
        return np.concatenate([document.key_losses for document in self.documents])


def longppl(
    texts: str | Sequence[str],
    model: Any,
    evaluator: Any = None,
    trunc_len: int = 4096,
    stride: int = 1024,
    alpha: float = 2.0,
    beta: float = -2.0,
    cache: str | Path | None = None,
    tokenizer: Any = None,
    evaluator_tokenizer: Any = None,
    intervals: str | Path | None = None,
    bos_in_windows: bool = False,
) -> LongPPL:
    """LongPPL and perplexity of texts.

    Args:
        texts: documents, or one; each with more than trunc_len tokens of the evaluator.
        model: what is evaluated: a run directory, a Hugging Face folder or hub id, a model in memory, a `Subject`, or a function
            of ids [b, t] that gives logits [b, t, v].
        evaluator: what finds the key tokens, in the same forms.
        trunc_len, stride: tokens of short context, and how far windows move.
        alpha, beta: a token is key where the long context gains more than alpha nats and its log-likelihood is above beta.
        cache: folder in which the evaluator's losses are kept per text.
        tokenizer, evaluator_tokenizer: in place of the models' own; a plain function needs one. A path, a tokenizer, or an object
            with `spans(text, special)` that gives ids and (start, end) characters.
        intervals: a file of `write_intervals` in place of an evaluator.
        bos_in_windows: put the evaluator's first special tokens before every window.

    Raises:
        ConfigError: no evaluator, a stride or trunc_len below 1, or windows longer than a model can read.
        DataError: a text too short or too long, tokenizers without usable offsets, intervals or kept losses of another text.
    """
    documents = [texts] if isinstance(texts, str) else list(texts)
    if not documents:
        raise DataError("no text was given; give at least one.")
    rule = KeyRule(trunc_len, stride, alpha, beta, bos_in_windows)
    _check_given(evaluator, intervals)
    ours = scorer_of(model, tokenizer)
    require_room(ours, rule)
    found: list[tuple[Intervals, Evidence | None]]
    same = _equal(evaluator, model) and _equal(evaluator_tokenizer, tokenizer)
    if intervals is not None:
        found = [(kept, None) for kept in read_intervals(intervals, documents)]
        judge = f"intervals of {intervals}"
    else:
        theirs = ours if same else scorer_of(evaluator, evaluator_tokenizer)
        found = [(one.intervals, one) for one in judged_texts(documents, theirs, rule, cache)]
        judge = theirs.name
    scored = tuple(
        _document(n, text, ours, kept, one, same)
        for n, (text, (kept, one)) in enumerate(zip(documents, found, strict=True))
    )
    return LongPPL(scored, rule, ours.name, judge, _beyond(ours, scored))


def judged_texts(texts: Sequence[str], evaluator: Scorer, rule: KeyRule, cache: str | Path | None) -> list[Evidence]:
    """What an evaluator says of each text, from the cache where it is there; raises what `longppl` raises."""
    require_room(evaluator, rule)
    where = None if cache is None else Path(cache)
    identity = "" if where is None else evaluator.identity()
    return [evidence_of(text, evaluator, rule, number, where, identity) for number, text in enumerate(texts)]


def _check_given(evaluator: Any, intervals: Any) -> None:
    if (evaluator is None) == (intervals is None):
        raise ConfigError(
            "key tokens come from an evaluator or from a file of intervals; give exactly one of evaluator and intervals."
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether two models were given as the same one."""
    return one is other or (isinstance(one, str | Path) and isinstance(other, str | Path) and str(one) == str(other))


def require_room(scorer: Scorer, rule: KeyRule) -> None:
    """Raise ConfigError for windows that a model cannot read."""
    width = rule.trunc_len + rule.stride
    if scorer.max_length is not None and width > scorer.max_length:
        raise ConfigError(
            f"windows have up to trunc_len + stride = {rule.trunc_len} + {rule.stride} = {width} tokens and {scorer.name} "
            f"reads at most {scorer.max_length}; give a smaller trunc_len or stride."
        )


def _document(
    number: int, text: str, model: Scorer, intervals: Intervals, evidence: Evidence | None, same: bool
) -> Document:
    """Losses of the evaluated model; those of the evaluator where it is the same model on the same ids."""
    ids, spans = model.encoded(text, False)
    if model.fixed and model.max_length is not None and len(ids) > model.max_length:
        raise DataError(
            f"document {number} has {len(ids):,} tokens and {model.name} has a table of {model.max_length:,} positions; give "
            "shorter texts."
        )
    known = same and evidence is not None and tuple(ids) == evidence.ids
    losses_t = (evidence.full_t if known and evidence is not None else full_losses(model, ids))[1:]
    chosen = np.flatnonzero(inside(spans, intervals))
    return Document(number, tuple(spans), losses_t, chosen[chosen > 0] - 1, intervals, evidence)


def _beyond(model: Scorer, documents: Sequence[Document]) -> tuple[str, ...]:
    """A note where texts are longer than the model's context."""
    longest = max(document.tokens for document in documents)
    if model.max_length is None or longest <= model.max_length:
        return ()
    return (f"texts have up to {longest:,} tokens, more than the {model.max_length:,} that {model.name} was made for.",)


def _perplexity(losses: NDArray[np.float64]) -> float | None:
    return math.exp(losses.mean()) if losses.size else None
