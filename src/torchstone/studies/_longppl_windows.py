"""Trained models of limited sight: eight decoders per seed, four attention windows by two widths, and an evaluator apart.

A row is Markov text over some tokens, in which classes are mentioned: a marker of the class, then its member in this row, which
is drawn once per row. Nothing but an earlier mention tells the member, and mentions of a class are log-uniformly far apart,
from less than the shortest window to more than the longest. A width too small for the Markov table raises the loss of nearly
every token; the window decides which members can be told. So perplexity follows the width, and long-context ability the window.

The evaluator sees the whole row and is trained on rows of its own from an initialisation of its own. Key tokens are its key
tokens on rows that nothing was trained on. The benchmark is recall: the share of members whose last mention is further away
than a window of LongPPL, known to the generator, that a model ranks first, on further rows.

Shapes: n rows · t tokens · v local tokens · m models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchstone.data.batch import Batch
from torchstone.evals.longppl_keys import key_tokens
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.objectives.next_token import NextToken
from torchstone.studies import _longppl as readers
from torchstone.studies import _longppl_training as training
from torchstone.train.precision import default_device


@dataclass(frozen=True)
class Mentions:
    """Rows with far mentions; ids: local tokens, markers, members by class.

    Attributes:
        local, classes, members: tokens of the Markov text, classes, members of each.
        nearest, furthest: tokens between two mentions of a class.
        length: inputs of a row.
    """

    local: int
    classes: int
    members: int
    nearest: int
    furthest: int
    length: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.local + self.classes * (1 + self.members)

    def rows(self, language: int, seed: int, count: int) -> tuple[Batch, NDArray[np.int64]]:
        """Rows, and for each target how far back its member was mentioned last, [n, t] (0: no member, or its first mention)."""
        logits_vv = np.random.default_rng([language, 1]).normal(0, 2.0, (self.local, self.local))
        steps_vv = np.exp(logits_vv - np.logaddexp.reduce(logits_vv, axis=1, keepdims=True)).cumsum(axis=1)
        draw = np.random.default_rng([seed, 2])
        tokens_nt = draw.integers(self.local, size=(count, self.length + 1))
        for at in range(1, self.length + 1):
            above_nv = steps_vv[tokens_nt[:, at - 1]] > draw.random(count)[:, None]
            tokens_nt[:, at] = np.where(above_nv.any(axis=1), above_nv.argmax(axis=1), self.local - 1)
        back_nt = np.zeros_like(tokens_nt)
        for tokens_t, back_t in zip(tokens_nt, back_nt, strict=True):
            self._mention(tokens_t, back_t, draw)
        inputs_nt, targets_nt = (torch.from_numpy(part.copy()) for part in (tokens_nt[:, :-1], tokens_nt[:, 1:]))
        return Batch(inputs_nt, targets_nt), back_nt[:, 1:]

    def _mention(self, tokens_t: NDArray[np.int64], back_t: NDArray[np.int64], draw: np.random.Generator) -> None:
        """Write the mentions of all classes into a row of local tokens."""
        near, far = np.log(self.nearest), np.log(self.furthest)
        for one in draw.permutation(self.classes).tolist():
            member = self.local + self.classes + one * self.members + int(draw.integers(self.members))
            at, last = int(draw.integers(self.nearest)), None
            while at + 1 < len(tokens_t):
                if tokens_t[at : at + 2].max() < self.local:
                    tokens_t[at : at + 2] = self.local + one, member
                    back_t[at + 1] = 0 if last is None else at - last
                    last = at
                at += round(float(np.exp(draw.uniform(near, far))))


def decoder(settings: Mapping[str, Any], width: int, window: int | None, seed: int) -> Decoder:
    """One untrained block whose attention sees `window` tokens, without positions, which a lookup by class does not need."""
    mixer = {"kind": "attention", "position": {"kind": "none"}, "window": window}
    initialisation = {"kind": "normal", "std": 0.1, "embedding_std": 0.5, "scale_residual": False}
    sizes = {"width": width, "depth": 1, "head_dim": settings["head_dim"]}
    config = DecoderConfig.model_validate({**sizes, "block": {"mixer": mixer}, "initialisation": initialisation})
    return config.build(mentions(settings).vocab_size, settings["length"], seed).to(default_device())


def mentions(settings: Mapping[str, Any]) -> Mentions:
    """The rows of a scale."""
    names = ("local", "classes", "members", "nearest", "furthest", "length")
    return Mentions(*(settings[name] for name in names))


def fitted(model: Decoder, rows: Batch, settings: Mapping[str, Any]) -> Decoder:
    """The model after one pass over rows."""
    pieces = rows.split(settings["batch"])
    training.train_on(model, NextToken(), pieces.__getitem__, len(pieces), settings["learning_rate"])
    return model


@dataclass(frozen=True)
class Trained:
    """The models of a seed on its scored rows and its benchmark.

    Attributes:
        losses_mnt: of every model on the scored rows.
        recall_m, names: of every model.
        full_nt, short_nt: of the evaluator; nan where a window has no loss.
        far_nt: members whose last mention is out of a window's sight.
    """

    losses_mnt: NDArray[np.float32]
    recall_m: NDArray[np.float64]
    names: tuple[str, ...]
    full_nt: NDArray[np.float32]
    short_nt: NDArray[np.float32]
    far_nt: NDArray[np.bool_]


def trained(settings: Mapping[str, Any], seed: int) -> Trained:
    """Train the models and the evaluator of one seed, and take their losses."""
    data, count = mentions(settings), settings["steps"] * settings["batch"]
    train, theirs = (data.rows(seed, 10 * seed + part, count)[0] for part in (1, 2))
    (scored, back_nt), (test, test_back_nt) = (data.rows(seed, 10 * seed + part, settings["rows"]) for part in (3, 4))
    scored, test = scored.to(default_device()), test.to(default_device())
    reach = settings["trunc_len"] + settings["stride"]
    judge = fitted(decoder(settings, max(settings["widths"]), None, training.EVALUATOR + seed), theirs, settings)
    full_nt, short_nt = training.judged(judge, scored, settings["trunc_len"], settings["stride"])
    losses, recall, names = [], [], []
    for width in settings["widths"]:
        for window in settings["windows"]:
            model = fitted(decoder(settings, width, window, seed), train, settings)
            losses.append(training.losses_of(model, scored)[0].cpu().numpy())
            right_nt = training.losses_of(model, test)[1].cpu().numpy()
            recall.append(float(right_nt[test_back_nt > reach].mean()))
            names.append(f"window {window}, width {width}")
    return Trained(np.stack(losses), np.array(recall), tuple(names), full_nt, short_nt, back_nt > reach)


def measure(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Correlations with recall of log perplexity on key tokens, on all and on as many random ones, and what is behind them."""
    found = trained(settings, seed)
    key_nt = key_tokens(found.full_nt, found.short_nt, settings["alpha"], settings["beta"])
    pool, random_nt = np.flatnonzero(~np.isnan(found.short_nt)), np.zeros(key_nt.size, dtype=np.bool_)
    random_nt[np.random.default_rng([seed, 4]).choice(pool, int(key_nt.sum()), replace=False)] = True
    masks = {"key": key_nt, "all": np.ones_like(key_nt), "random": random_nt.reshape(key_nt.shape)}
    values = {name: readers.mean_losses(found.losses_mnt, mask_nt) for name, mask_nt in masks.items()}
    r = {name: readers.correlation(values_m, found.recall_m) for name, values_m in values.items()}
    columns = [[None] * len(found.names) if values_m is None else values_m.tolist() for values_m in values.values()]
    return {
        "metrics": {
            "trained_longppl": r["key"],
            "trained_ppl": r["all"],
            "trained_gap": r["key"] - r["all"],
            "trained_gap_random": r["key"] - r["random"],
            "trained_recall": float(found.recall_m.max()),
            "share": float(key_nt.mean()),
            "copies": float(found.far_nt[key_nt].mean()) if key_nt.any() else 0.0,
        },
        "models": [list(row) for row in zip(found.names, found.recall_m.tolist(), *columns, strict=True)],
    }
