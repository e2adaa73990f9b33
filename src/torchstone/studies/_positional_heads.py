"""Positional heads' study: one trained model per seed, scored, and taken apart head by head.

A record holds everything that any arm reads of a seed's model. It is made once and kept beside the cells, because the
arms of this study are ways to choose heads of the same model.

Shapes: b sequences · t tokens · s keys · h heads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.mixture import Mixture, Shifted
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.distance.ablation import increases
from torchstone.diagnose.distance.heads import DistanceSettings, HeadTable, distance_heads
from torchstone.diagnose.subject import Activations, AttentionLayer, Head, Subject
from torchstone.lab.study import Cell
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.storage.atomic import atomic_write
from torchstone.storage.lease import Lease

TEXT, RECALL = 0, 1  # parts of the mixture
LEASE_SECONDS = 120.0
WAIT_SECONDS = 0.5
RECORD = "record.json"
SCORES = ("shift", "mean_distance", "retrieval")


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """A small rotary decoder on half text, half recall."""
    length = settings["length"]
    return load_recipe({
        "model": {
            "kind": "decoder", "width": settings["width"], "depth": settings["depth"], "head_dim": settings["head_dim"],
            "block": {"mixer": {
                "kind": "attention", "heads": settings["heads"], "head_dim": settings["head_dim"],
                "position": {"kind": "rotary", "layout": "half", "base": settings["base"]},
            }},
            "initialisation": {"kind": "normal", "std": 0.1, "embedding_std": 0.5, "scale_residual": False},
        },
        "data": {"kind": "mixture", "shares": [0.5, 0.5], "sources": [
            {"kind": "text", "tokenizer": "bytes", "length": length},
            {"kind": "gap-recall", "cells": length // 2, "max_gap": settings["max_gap"]},
        ]},
        "optimizer": {"kind": "adamw", "learning_rate": settings["learning_rate"]},
        "schedule": {"kind": "constant"},
        "budget": {"steps": settings["steps"]},
        "batch": {"sequences": settings["batch"]},
        "evaluation": {"every": None, "sequences": 64},
        "precision": "fp32",  # scores and pilots are of 32 bits; what is fast on a machine shall not decide
    })  # fmt: skip


def record_of(cell: Cell) -> dict[str, Any]:
    """The record of the cell's seed.

    One process makes it and the others read it. A process that would only wait makes the record of the next seed
    meanwhile.
    """
    beside = cell.directory.parents[1]
    root = (
        beside.parent / "models" if beside.name == "cells" else cell.directory
    )  # an executor elsewhere shares nothing
    wanted = [seed for seed in (cell.seed, cell.seed + 1) if seed == cell.seed or seed < cell.settings["seeds"]]
    own = root / f"seed-{cell.seed}"
    while not (own / RECORD).exists():
        if not any(_try_to_make(cell, root, seed) for seed in wanted):
            time.sleep(WAIT_SECONDS)
    return json.loads((own / RECORD).read_text())


def _try_to_make(cell: Cell, root: Path, seed: int) -> bool:
    """Make a seed's record unless it exists or another process is at it; True if it was made."""
    directory = root / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    lease = Lease(directory / "record.lease", ttl=LEASE_SECONDS)
    if (directory / RECORD).exists() or not lease.acquire():
        return False
    try:
        if not (directory / RECORD).exists():
            atomic_write(directory / RECORD, json.dumps(_make(cell, directory / "run", seed)) + "\n")
        return True
    finally:
        lease.release()


def _make(cell: Cell, directory: Path, seed: int) -> dict[str, Any]:
    from torchstone.train.precision import Compute
    from torchstone.train.run import load_run, train

    compute = Compute(**cell.prepared["compute"])
    recipe = load_recipe(cell.arm.settings["recipe"], [f"seed={seed}"])
    summary = train(recipe, directory, compute=compute, progress=cell.report, device=None)
    _, model, data = load_run(directory)
    subject = open_subject(model, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    record = Bench(subject, data, cell.settings, seed).record()
    untrained = Bench(subject.untrained(seed), data, cell.settings, seed)
    record["untrained"] = untrained.table().column("shift").tolist()
    return {**record, "tokens": summary.tokens, "flops": summary.flops}


class Bench:
    """Measurements of one model on held-out text and recall.

    Args:
        subject, data: the model, and the mixture that it was trained on.
        settings: of the scale.
        seed: of the random draws.
    """

    def __init__(self, subject: Subject, data: Mixture, settings: Mapping[str, Any], seed: int) -> None:
        self.subject, self.settings, self.seed = subject, settings, seed
        self.recall_part = data.part(RECALL)
        count, scored = settings["evaluate"], settings["scored"]
        self.recall, self.recall_scored = _halves(data.part(RECALL), count, scored, subject.device)
        self.text, self.text_scored = _halves(data.part(TEXT), count, scored, subject.device)
        source: Any = self.recall_part.inner
        self.gap_bt = source.gaps(self.recall_part.own_ids(self.recall.tokens_bt))

    def table(self) -> HeadTable:
        """Scores of all heads on sequences that the ablations do not use."""
        tokens_bt = torch.cat([self.text_scored.tokens_bt, self.recall_scored.tokens_bt])
        return distance_heads(self.subject, tokens_bt, DistanceSettings(keys=None, seed=self.seed))

    @torch.no_grad()
    def retrieval(self) -> list[float]:
        """Mean attention of every head from a question to its answer."""
        source: Any = self.recall_part.inner
        answers_bts = source.answer_positions(self.recall_part.own_ids(self.recall_scored.tokens_bt))
        asked_bt = answers_bts.any(-1)
        found: list[float] = []

        def look(layer: AttentionLayer, seen: Activations) -> None:
            assert seen.weights_bhts is not None
            mass_bht = (seen.weights_bhts * answers_bts[:, None]).sum(-1)
            found.extend(mass_bht.transpose(1, 2)[asked_bt].mean(0).tolist())

        self.subject.visit(self.recall_scored.tokens_bt, look, weights=True)
        return found

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Share of wrong answers over all and over distant questions, and the loss on text, of the model as it is."""
        right_bt = self.subject.logits(self.recall.tokens_bt).argmax(-1) == self.recall.targets_bt
        asked_bt = self.recall.targets_bt != IGNORE
        found = {
            "recall": 1 - float(right_bt[asked_bt].double().mean()),
            "distant": 1 - float(right_bt[self.gap_bt >= self.settings["length"] // 4].double().mean()),
            "text": float(self.subject.losses(self.text.tokens_bt).mean()),
        }
        for low, high in self.buckets():
            inside_bt = (self.gap_bt >= low) & (self.gap_bt < high)
            found[f"gap {low}"] = 1 - float(right_bt[inside_bt].double().mean())
        return found

    def buckets(self) -> list[tuple[int, int]]:
        """Gaps by which accuracy is reported."""
        edges = [1, *(self.settings["length"] // n for n in (16, 8, 4, 2)), self.settings["length"]]
        return list(zip(edges, edges[1:], strict=False))

    def without(self, heads: Sequence[Head], mode: str = "mean") -> dict[str, float]:
        """The measurements with heads ablated."""
        window = self.settings["window"] if mode == "window" else None
        with self.subject.ablate(heads, mode, window=window) if heads else nullcontext():  # type: ignore[arg-type]
            return self.measure()

    def record(self) -> dict[str, Any]:
        """Scores of all heads, what each alone is worth, and what the first k by every rule are."""
        table, plain = self.table(), self.measure()
        heads = table.heads()
        columns = {name: table.column(name).tolist() for name in ("shift", "z", "far", "mean_distance")}
        columns["retrieval"] = self.retrieval()
        single = [self.without([head]) for head in heads]
        chosen = {rule: top(heads, columns[rule], self.settings["top"]) for rule in SCORES}
        chosen["shift"] = eligible_first(table, chosen_from=top(heads, columns["shift"], len(heads)))[
            : self.settings["top"]
        ]
        lowest = top(heads, [-score for score in columns["shift"]], self.settings["top"])
        rises = {
            "mean": self._rises(chosen["shift"], lowest, "mean"),
            "window": self._rises(chosen["shift"], lowest, "window"),
        }
        for rule in ("mean_distance", "retrieval"):
            for mode in rises:
                found = self.without(chosen[rule], mode)
                rises[mode][rule] = {name: found[name] - plain[name] for name in plain}
        return {
            "heads": [list(head) for head in heads],
            "columns": columns,
            "single": [found["recall"] - plain["recall"] for found in single],
            "single_text": [found["text"] - plain["text"] for found in single],
            "chosen": {rule: [list(head) for head in found] for rule, found in (*chosen.items(), ("lowest", lowest))},
            "plain": plain,
            "rises": rises,
        }

    def _rises(self, chosen: Sequence[Head], lowest: Sequence[Head], mode: Any) -> dict[str, Any]:
        found = increases(
            self.subject, self.measure, chosen, lowest=lowest, mode=mode, draws=self.settings["draws"], seed=self.seed,
            window=self.settings["window"] if mode == "window" else None,
        )  # fmt: skip
        return {
            "shift": {name: rise.chosen for name, rise in found.items()},
            "lowest": {name: rise.lowest for name, rise in found.items()},
            "random": {name: list(rise.random) for name, rise in found.items()},
        }


def top(heads: Sequence[Head], scores: Sequence[float], count: int) -> list[Head]:
    """The `count` heads of the highest score."""
    return [heads[i] for i in np.argsort(-np.asarray(scores), kind="stable")[:count]]


def _halves(part: Shifted, count: int, scored: int, device: torch.device) -> tuple[Batch, Batch]:
    """Held-out rows for ablations, and others for scores (no more of them)."""
    first, second = next(part.evaluation(count + scored, count + scored)).split(count)
    return first.to(device), second.to(device)


def eligible_first(table: HeadTable, chosen_from: Sequence[Head]) -> list[Head]:
    """Distance heads as the analysis selects them (shift above 0, mean distance above the layer's median) by falling shift,
    then the other heads in the order given, for models that have too few of the former."""
    eligible = table.ranked()
    return [*eligible, *(head for head in chosen_from if head not in eligible)]
