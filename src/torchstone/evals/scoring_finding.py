"""Excess loss of every token of a text, and which tokens would be selected: two models read the same text.

The excess loss of a token is the model's loss minus the reference's. Selective language modelling (Rho-1, Lin et al., arXiv
2404.07965) trains on the tokens with the most excess loss: those that the reference knows and the model does not yet. Tokens that
both find hard are likely noise, tokens that both know are learned; neither has much excess.

    OUT/report.html     the text coloured by excess loss, selected tokens marked
        tokens.jsonl    one line per token: text, number, id, place in the text, both losses, excess, selected
        losses/         losses of blocks of windows, from which the same command continues
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchstone.data.loss_store import read_block, write_block
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.evals.scoring import (
    Report,
    check_same_tokens,
    check_window,
    default_window,
    quiet,
    score_text,
    weights_hash,
)
from torchstone.objectives.selection import Evidence, Rule, chosen, scored
from torchstone.report.finding import Finding, TokenSpan, TokenText
from torchstone.report.result import Table
from torchstone.report.token_texts import MOST_SPANS
from torchstone.storage.atomic import fsync_path
from torchstone.storage.hashing import fingerprint_of

TOKENS, LOSSES = "tokens.jsonl", "losses"
SHOWN = 30  # tokens in the table of extremes
MOST_TEXTS = 20  # texts on the page


@dataclass(frozen=True, eq=False)
class ScoredText:
    """One text under two models.

    Attributes:
        name: of the text.
        text: itself.
        ids: tokens.
        spans: characters of each token.
        model_n, reference_n: losses; nan for a first token that nothing stands before.
        selected_n: which tokens would be trained on.
    """

    name: str
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]
    model_n: NDArray[np.float32]
    reference_n: NDArray[np.float32]
    selected_n: NDArray[np.bool_]

    @property
    def excess_n(self) -> NDArray[np.float32]:
        """The model's loss minus the reference's."""
        return self.model_n - self.reference_n


def score_texts(
    model: Subject,
    reference: Subject,
    texts: Sequence[tuple[str, str]],
    *,
    ratio: float = 0.6,
    window: int | None = None,
    stride: int | None = None,
    kept: Path | None = None,
    report: Report = quiet,
) -> list[ScoredText]:
    """Losses of both models on every token, and the share `ratio` of all tokens with the most excess loss.

    Args:
        model: the one that would be trained.
        reference: the one that is trusted; it needs the same tokenizer.
        texts: name and text of each.
        ratio: share of all tokens together that is selected.
        window: tokens that a model sees at once; None: what both were trained on, at most 1024.
        stride: tokens that each later window scores; None: half a window.
        kept: folder of finished losses; what is there is not computed again. None: nothing is kept.
        report: receives texts done (each counts once per model) and in all.

    Raises:
        ConfigError: a text that is given twice, vocabularies or tokenizers that differ, a ratio outside (0, 1], a window that
            does not fit.
        DataError: no text, or a loss that is not finite.
    """
    rule = Rule(ratio=ratio)
    window = default_window(model, reference) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    for subject in (model, reference):
        check_window(subject, window, stride)
    _refuse_twice(texts)
    check_same_tokens(model, reference, [text for _, text in texts])
    encoded = [model.spans(text) for _, text in texts]
    losses: list[list[NDArray[np.float32]]] = []
    for number, subject in enumerate((model, reference)):
        weights, found = weights_hash(subject.model), []
        for index, (ids, _) in enumerate(encoded):
            found.append(_losses(subject, weights, ids, window, stride, kept))
            report(number * len(texts) + index + 1, 2 * len(texts))
        losses.append(found)
    selected = _selected(rule, *losses)
    return [
        ScoredText(name, text, ids, spans, model_n, reference_n, picked_n)
        for (name, text), (ids, spans), model_n, reference_n, picked_n in zip(
            texts, encoded, *losses, selected, strict=True
        )
    ]


def _refuse_twice(texts: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigError for a text that is given twice, whose tokens would count double in the selection."""
    first: dict[str, str] = {}
    for name, text in texts:
        if text in first:
            raise ConfigError(f"{name} is the same text as {first[text]}; give each text once.")
        first[text] = name


def _losses(
    subject: Subject, weights: str, ids: list[int], window: int, stride: int, kept: Path | None
) -> NDArray[np.float32]:
    """Losses of one text; blocks of windows that are in the folder already are read from there."""
    if kept is None:
        return score_text(subject, ids, window=window, stride=stride)
    kept.mkdir(parents=True, exist_ok=True)
    name = fingerprint_of([weights, ids, window, stride])

    def keep(number: int, count: int, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        path = kept / f"{name}-{number:06d}"
        there = read_block(path, (count,), "<f4")
        if there is None:
            there = compute().astype("<f4")
            write_block(path, there)
        return there

    return score_text(subject, ids, window=window, stride=stride, keep=keep)


def _selected(
    rule: Rule, model: Sequence[NDArray[np.float32]], reference: Sequence[NDArray[np.float32]]
) -> list[NDArray[np.bool_]]:
    """Which tokens of all texts together have the most excess loss."""
    whole = torch.from_numpy(np.concatenate(model))[None], torch.from_numpy(np.concatenate(reference))[None]
    valid_1n = whole[0].isfinite()
    if not bool(valid_1n.any()):
        raise DataError("no token has one before it, so that none is predicted; give longer texts.")
    losses_1n, reference_1n = (one.nan_to_num(0.0) for one in whole)
    scores_1n = scored(rule, Evidence(valid_1n, losses_bt=losses_1n, reference_bt=reference_1n))
    weights_n = chosen(rule, [scores_1n])[0].weights_bt[0]
    ends = np.cumsum([len(one) for one in model])[:-1]
    return list(np.split((weights_n > 0).numpy(), ends))


def score_finding(model: Subject, reference: Subject, texts: Sequence[ScoredText], ratio: float) -> Finding:
    """The scored texts as a finding."""
    model_n, reference_n, selected_n = (
        np.concatenate([getattr(one, name) for one in texts]) for name in ("model_n", "reference_n", "selected_n")
    )
    excess_n = model_n - reference_n
    valid_n = np.isfinite(excess_n)
    every = _mean(excess_n[valid_n])
    drawn = token_texts(texts)
    shown = f"The first {len(drawn)} of {len(texts)} texts are on the page; {TOKENS} has all."
    return Finding(
        analysis="score",
        title="Excess loss of every token",
        question="Which tokens of this text does the reference know and the model not yet?",
        subject=f"{model.describe()}; reference: {reference.describe()}",
        answer=f"Of {int(valid_n.sum()):,} tokens, {int(selected_n.sum()):,} would be selected at a ratio of {ratio:g}. Their "
        f"mean excess loss is {_mean(excess_n[selected_n]):+.3f} nats; that of all tokens is {every:+.3f} "
        f"({_mean(model_n[valid_n]):.3f} of the model, {_mean(reference_n[valid_n]):.3f} of the reference).",
        control=f"A random choice of as many tokens has the mean excess loss of all, {every:+.3f} nats in expectation. The "
        "reference's own loss separates what it knows from noise that both models miss: see the table's last columns.",
        tables=(_table(texts), _extremes(texts)),
        token_texts=drawn,
        notes=(
            "Selected: the largest excess losses of all texts together; among equals the earlier token.",
            *((shown,) if len(drawn) < len(texts) else ()),
        ),
    )


def token_texts(texts: Sequence[ScoredText], most: int = MOST_SPANS) -> tuple[TokenText, ...]:
    """The first texts coloured by excess loss, as many tokens of all together as a page shows."""
    found = []
    for one in texts[:MOST_TEXTS]:
        if most <= 0:
            break
        text = token_text(one, most)
        most -= len(text.spans)
        found.append(text)
    return tuple(found)


def token_text(one: ScoredText, most: int) -> TokenText:
    """The first tokens of a text coloured by excess loss."""
    spans = tuple(
        TokenSpan(text=piece, value=float(value) if np.isfinite(value) else None, marked=bool(marked))
        for piece, value, marked in zip(pieces(one, most), one.excess_n[:most], one.selected_n[:most], strict=True)
    )
    note = (
        f"The first {len(spans):,} of {len(one.ids):,} tokens; {TOKENS} has all." if len(spans) < len(one.ids) else ""
    )
    return TokenText(
        title=one.name, value_label="excess loss (nats)", mark_label="selected for training", spans=spans, note=note
    )


def pieces(one: ScoredText, most: int | None = None) -> list[str]:
    """The text in as many pieces as tokens, which together are the text: spaces that no token spans go with the next token.

    `most`: only those of the first tokens.
    """
    found, at = [], 0
    for start, stop in one.spans[:most]:
        stop = max(at, stop)
        found.append(one.text[min(at, start) if start > at else at : stop])
        at = stop
    if found and len(found) == len(one.spans):
        found[-1] += one.text[at:]
    return found


def _table(texts: Sequence[ScoredText]) -> Table:
    rows = []
    for one in texts:
        valid_n, picked_n = np.isfinite(one.excess_n), one.selected_n
        rest_n = valid_n & ~picked_n
        numbers = [_mean(values[valid_n]) for values in (one.model_n, one.reference_n, one.excess_n)]
        share = float(picked_n.sum() / valid_n.sum()) if valid_n.any() else None
        rows.append(
            (
                one.name,
                int(valid_n.sum()),
                *numbers,
                share,
                _mean(one.reference_n[picked_n]),
                _mean(one.reference_n[rest_n]),
            )
        )
    columns = ("text", "tokens", "model loss", "reference loss", "excess", "share selected", "reference loss, selected",
               "reference loss, left out")  # fmt: skip
    return Table(title="Texts", columns=columns, rows=tuple(rows), note="means in nats per token")


def _mean(values: NDArray[np.float32]) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None


def _extremes(texts: Sequence[ScoredText]) -> Table:
    """The tokens with the most and the least excess loss."""
    found = [
        (float(value), number, at)
        for number, one in enumerate(texts)
        for at, value in enumerate(one.excess_n)
        if np.isfinite(value)
    ]
    found.sort(key=lambda item: (-item[0], item[1], item[2]))
    shown = found if len(found) <= 2 * SHOWN else found[:SHOWN] + found[-SHOWN:]
    rows = []
    for value, number, at in shown:
        one = texts[number]
        start, stop = one.spans[at]
        context = one.text[max(0, start - 30) : start].replace("\n", "⏎")
        rows.append(
            (
                one.name,
                at,
                context,
                one.text[start:stop].replace("\n", "⏎"),
                float(one.model_n[at]),
                float(one.reference_n[at]),
                value,
                int(one.selected_n[at]),
            )
        )
    columns = ("text", "token", "after", "piece", "model loss", "reference loss", "excess", "selected")
    return Table(title="Most and least excess loss", columns=columns, rows=tuple(rows))


def records(texts: Sequence[ScoredText]) -> Iterator[dict[str, Any]]:
    """One mapping per token, as it stands in `tokens.jsonl`; losses are null where nothing predicts the token."""
    for one in texts:
        for at, piece in enumerate(pieces(one)):
            numbers = {"loss": one.model_n[at], "reference": one.reference_n[at], "excess": one.excess_n[at]}
            yield {
                "text": one.name,
                "token": at,
                "id": one.ids[at],
                "start": one.spans[at][0],
                "stop": one.spans[at][1],
                "piece": piece,
                **{name: float(value) if np.isfinite(value) else None for name, value in numbers.items()},
                "selected": bool(one.selected_n[at]),
            }


def write_records(texts: Sequence[ScoredText], out: Path) -> Path:
    """Write `tokens.jsonl` into a folder; returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / TOKENS
    unfinished = path.with_name(f"{TOKENS}.partial")
    with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{json.dumps(record, ensure_ascii=False, allow_nan=False)}\n" for record in records(texts))
    fsync_path(unfinished)
    unfinished.replace(path)
    fsync_path(out)
    return path
