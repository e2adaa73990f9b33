"""LongPPL of one model as a finding: beside plain perplexity, as many tokens chosen by chance, and foreign far context.

Two controls. As many tokens of every document drawn from those that the windows scored say whether key tokens are special. And
key tokens must lose their advantage where the far context is another document's, or is cut off (`longppl_controls`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.evals.longppl import Document, LongPPL, longppl
from torchstone.evals.longppl_cache import KeyRule
from torchstone.evals.longppl_controls import FarContext, far_context
from torchstone.evals.longppl_keys import bigram_distances, inside
from torchstone.evals.longppl_scorer import scorer_of
from torchstone.report.finding import Finding, TokenSpan, TokenText
from torchstone.report.result import Figure, Line, Table

DRAWS = 200  # random choices of as many tokens
EDGES = (-math.inf, -2.0, -1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, math.inf)
SHOWN = 3  # documents whose text is shown


def longppl_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    evaluator: str | None = None,
    trunc_len: int = 4096,
    stride: int = 1024,
    alpha: float = 2.0,
    beta: float = -2.0,
    cache: str | None = None,
    intervals: str | None = None,
    documents: int = 32,
    skip_short: bool = False,
    bos_in_windows: bool = False,
) -> Finding:
    """Perplexity on the tokens that need the long context.

    Args:
        subject: the model.
        texts: documents, each with more than trunc_len tokens of the evaluator.
        evaluator: the model that finds the key tokens: a run directory, a Hugging Face folder, or a name on its hub.
        trunc_len: tokens of short context.
        stride: tokens that a window moves on, and that it scores.
        alpha: nats that the long context must gain for a token to be key.
        beta: log-likelihood with the long context that a key token must exceed.
        cache: folder in which the evaluator's losses are kept for other models.
        intervals: file of key intervals in place of an evaluator, a line for each document.
        documents: texts to read, the first ones.
        skip_short: leave out texts that are too short, in place of an error.
        bos_in_windows: put the evaluator's first special tokens before every window.

    Raises:
        ConfigError: no evaluator, stride or trunc_len below 1, or windows longer than a model can read.
        DataError: a text too short, tokenizers without usable offsets, intervals of another text.
    """
    if documents < 1:
        raise ConfigError(f"documents was given as {documents}; it must be at least 1.")
    rule = KeyRule(trunc_len, stride, alpha, beta, bos_in_windows)
    judge = None if evaluator is None else subject if evaluator == subject.name else scorer_of(evaluator).source
    chosen, notes = _chosen(list(texts), judge, rule, documents, skip_short)
    found = longppl(
        chosen,
        subject,
        judge,
        trunc_len,
        stride,
        alpha,
        beta,
        cache,
        intervals=intervals,
        bos_in_windows=bos_in_windows,
    )
    return _report(subject, found, chosen, notes)


def _report(subject: Subject, found: LongPPL, texts: Sequence[str], notes: tuple[str, ...]) -> Finding:
    control, contexts = random_tokens(found), far_context(scorer_of(subject), texts, found)
    return Finding(
        analysis="longppl",
        title="Perplexity on the tokens that need the long context",
        question="How well does the model predict what only far context explains?",
        subject=subject.describe(),
        answer=_answer(found, control),
        control=_control(control, contexts),
        tables=(_documents_table(found), *_key_table(found), *_histogram_table(found), *_contexts_table(contexts)),
        figures=_histogram(found),
        token_texts=tuple(_text(one, texts[one.number], found) for one in found.documents[:SHOWN]),
        notes=(*found.warnings, *notes, *_small_print(found)),
    )


def _chosen(
    texts: list[str], judge: Subject | None, rule: KeyRule, documents: int, skip_short: bool
) -> tuple[list[str], tuple[str, ...]]:
    """The texts to read, and what a reader should know of the choice."""
    if not skip_short:
        left = len(texts) - documents
        return texts[:documents], (f"The first {documents} of {len(texts)} texts.",) if left > 0 else ()
    if judge is None:
        raise ConfigError("skip_short needs an evaluator, whose tokens say what is short; leave it out with intervals.")
    kept: list[str] = []
    read = 0
    for text in texts:
        if len(kept) == documents:
            break
        read += 1
        if len(judge.spans(text, True)[0]) > rule.trunc_len:
            kept.append(text)
    if not kept:
        raise DataError(
            f"none of the {len(texts)} texts has more than trunc_len = {rule.trunc_len} tokens; give longer texts, or a shorter "
            "trunc_len."
        )
    short = read - len(kept)
    words = f"The first {len(kept)} of {len(texts)} texts that have more than {rule.trunc_len} tokens; {short} were too short."
    return kept, (words,)


def random_tokens(found: LongPPL, seed: int = 0) -> tuple[float, float, float] | None:
    """Perplexity of as many tokens of each document drawn among those behind trunc_len: mean, and the middle 95 % of draws.

    None without key tokens.
    """
    if not found.key_tokens:
        return None
    draw = np.random.default_rng(seed)
    pools = [_behind(document, found.rule.trunc_len) for document in found.documents]
    means = []
    for _ in range(DRAWS):
        picked = [
            draw.choice(pool, len(one.key_index), False) for pool, one in zip(pools, found.documents, strict=True)
        ]
        means.append(float(np.concatenate(picked).mean()))
    low, high = np.quantile(means, [0.025, 0.975])
    return math.exp(float(np.mean(means))), math.exp(float(low)), math.exp(float(high))


def _behind(document: Document, trunc_len: int) -> NDArray[np.float64]:
    """Losses of the tokens behind the first trunc_len of the evaluator, key tokens included."""
    start = 0 if document.evidence is None else document.evidence.spans[trunc_len][0]
    index = np.array([at for at, (begin, _) in enumerate(document.spans) if at and begin >= start]) - 1
    index = np.union1d(index, document.key_index).astype(np.int64)
    return document.losses_t[index].astype(np.float64)


def _answer(found: LongPPL, control: tuple[float, float, float] | None) -> str:
    if found.longppl is None or control is None:
        return f"No token is key, so LongPPL is undefined. Perplexity is {_number(found.ppl)}."
    interval = "" if found.interval is None else f" ({found.interval[0]:.4g} to {found.interval[1]:.4g})"
    start = "" if found.sufficient else "Insufficient key tokens. "
    return (
        f"{start}LongPPL is {found.longppl:.4g}{interval} on {found.key_tokens:,} key tokens, {found.key_share:.1%} of all; "
        f"perplexity of all tokens is {_number(found.ppl)}. As many tokens chosen by chance have {control[0]:.4g} "
        f"({control[1]:.4g} to {control[2]:.4g})."
    )


def _control(control: tuple[float, float, float] | None, contexts: FarContext | None) -> str:
    drawn = "" if control is None else f" {DRAWS} draws have {control[0]:.4g} on average."
    if contexts is None:
        foreign = (
            "Foreign far context is not measured: it needs two documents, and key tokens behind their first window."
        )
    else:
        lost = contexts.lost(key=True)
        between = "" if lost.low is None or lost.high is None else f" ({lost.low:.3g} to {lost.high:.3g})"
        others = (
            "" if contexts.key_k.all() else f", other tokens of the same windows {contexts.lost(key=False).effect:.3g}"
        )
        foreign = f"With another document in place of the far context, key tokens lose {lost.effect:.3g}{between} nats{others}."
    return (
        "Plain perplexity of all tokens, and perplexity of as many tokens of each document chosen by chance among those that the "
        f"windows scored: what is particular to key tokens is the difference to it.{drawn} {foreign}"
    )


def _contexts_table(contexts: FarContext | None) -> tuple[Table, ...]:
    """The same tokens with far context of their own, of another document, and without."""
    if contexts is None:
        return ()
    rows = [(name, *contexts.perplexities(key)) for name, key in (("key tokens", True), ("other tokens", False))]
    columns = ("tokens", "number", "own far context", "another document's", "near context alone")
    note = "perplexity of the model in up to two windows of each document; near context is that of the windows"
    return (Table(title="What the far context is worth", columns=columns, rows=tuple(rows), note=note),)


def _documents_table(found: LongPPL) -> Table:
    rows = []
    for one in found.documents:
        near = None if one.evidence is None else one.evidence.near
        share = len(one.key_index) / one.tokens
        rows.append((one.number, one.tokens, len(one.key_index), share, one.longppl, one.ppl, near))
    columns = ("document", "tokens", "key tokens", "key share", "LongPPL", "perplexity", "near a threshold")
    note = "near a threshold: tokens of the evaluator that 0.05 nats would make key or not"
    return Table(title="Documents", columns=columns, rows=tuple(rows), note=note)


def _key_table(found: LongPPL) -> tuple[Table, ...]:
    """Where the key tokens' bigrams stood before the window."""
    rule, total = found.rule, 0
    rows: list[tuple[str | int, int, float, float | None]] = []
    distances: list[int] = []
    for one in found.documents:
        if one.evidence is None:
            return ()
        back = bigram_distances(one.evidence.ids, one.evidence.key_t, rule.trunc_len, rule.stride)
        known = [distance for distance in back if distance is not None]
        distances, total = [*distances, *known], total + len(back)
        if back:
            rows.append((one.number, len(back), len(known) / len(back), float(np.median(known)) if known else None))
    if not total:
        return ()
    middle = float(np.median(distances)) if distances else None
    rows.insert(0, ("all", total, len(distances) / total, middle))
    columns = ("document", "evaluator's key tokens", "share with an earlier bigram", "median distance (tokens)")
    note = "an earlier bigram: the token and the one before it stood together before the window, where only long context sees it"
    return (Table(title="Why tokens are key", columns=columns, rows=tuple(rows), note=note),)


def _differences(found: LongPPL) -> NDArray[np.float32] | None:
    """Long-short differences of all scored tokens."""
    known = [one.evidence.difference_t for one in found.documents if one.evidence is not None]
    if not known:
        return None
    values = np.concatenate(known)
    return values[~np.isnan(values)]


def _counts(found: LongPPL) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    values = _differences(found)
    return None if values is None else (np.histogram(values, np.array(EDGES))[0].astype(np.int64), values)


def _histogram_table(found: LongPPL) -> tuple[Table, ...]:
    counted = _counts(found)
    if counted is None:
        return ()
    counts, values = counted
    rows = tuple(
        (_edge(low), _edge(high), int(count), float(count) / values.size)
        for low, high, count in zip(EDGES, EDGES[1:], counts, strict=False)
    )
    columns = ("from (nats)", "to (nats)", "tokens", "share")
    note = "short loss minus full loss of the evaluator; above 0 where the long context helps"
    return (Table(title="Long-short difference", columns=columns, rows=rows, note=note),)


def _histogram(found: LongPPL) -> tuple[Figure, ...]:
    counted = _counts(found)
    if counted is None:
        return ()
    counts, values = counted
    shown = np.arange(-3.0, 8.01, 0.25)
    share = np.array([(values > x).mean() for x in shown])
    line = Line(name="share of tokens above", x=tuple(shown.tolist()), y=tuple(float(y) or None for y in share))
    return (
        Figure(
            title="Tokens by long-short difference",
            x_label="long-short difference of the evaluator (nats)",
            y_label="share of scored tokens above",
            log_y=True,
            lines=(line,),
            note=f"{values.size:,} scored tokens; α = {found.rule.alpha:g} is the threshold.",
        ),
    )


def _text(one: Document, text: str, found: LongPPL) -> TokenText:
    """A document, coloured by the evaluator's difference, with its key tokens marked."""
    note = "Tokens are the evaluator's; the first ones have no short loss and no colour."
    if one.evidence is None:
        key_t, values = inside(one.spans, one.intervals), np.full(len(one.spans), np.nan, dtype=np.float32)
        spans, note = one.spans, "Tokens are the model's; given intervals say which are key, and not by how much."
    else:
        key_t, values, spans = one.evidence.key_t, one.evidence.difference_t, one.evidence.spans
    pieces: list[TokenSpan] = []
    written = 0
    for (_, end), value, marked in zip(spans, values.tolist(), key_t.tolist(), strict=True):
        if end <= written:
            continue
        known = None if math.isnan(value) else value
        pieces.append(TokenSpan(text=text[written:end], value=known, marked=marked))
        written = end
    if written < len(text):
        pieces.append(TokenSpan(text=text[written:]))
    return TokenText(
        title=f"Document {one.number}",
        value_label="long-short difference of the evaluator (nats)",
        mark_label=f"key: difference above {found.rule.alpha:g}, log-likelihood above {found.rule.beta:g}",
        spans=tuple(pieces),
        note=note,
    )


def _small_print(found: LongPPL) -> tuple[str, ...]:
    rule = found.rule
    near = "" if found.near is None else f" {found.near:,} of its tokens lie within 0.05 nats of a threshold."
    interval = "" if found.interval else " There is no interval: it needs at least ten documents with key tokens."
    return (
        f"Evaluator: {found.evaluator}. Windows: trunc_len {rule.trunc_len}, stride {rule.stride}; α = {rule.alpha:g}, "
        f"β = {rule.beta:g}.{near}",
        f"The value of all documents weighs every key token alike; the interval is bootstrapped over documents.{interval}",
    )


def _edge(value: float) -> float | str:
    return value if math.isfinite(value) else ("below" if value < 0 else "above")


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"
