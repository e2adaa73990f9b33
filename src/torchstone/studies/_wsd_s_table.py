"""The convex half of the WSD-S study: tables of logits learnt by SGD on mixed bigram languages, several at once.

    W[c] ← W[c] − η · (n_c · softmax(W[c]) − counts of successors of c) / batch          n_c: how often c is in the batch

A learner holds several tables, each of a language of its own; its numbers are their means, so that one seed's noise is smaller.
Losses are exact: nothing is sampled but the languages and the batches.

Shapes: r tables · v contexts, v successors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from torchstone.data.keyed import key
from torchstone.data.synthetic.mixed_bigram import Excess, MixedBigram

AHEAD = 64  # steps whose pairs are drawn together


@dataclass(frozen=True)
class TableLook:
    """Exact excess, the mean over tables, and the loss of every table's contexts."""

    excess: Excess
    losses_rv: torch.Tensor


class TableLearner:
    """Tables from zero logits, trained with plain SGD at rate `peak` times a factor."""

    def __init__(self, tasks: Sequence[MixedBigram], seed: int, peak: float, batch: int) -> None:
        self.tasks, self.seed, self.peak, self.batch = tasks, seed, peak, batch
        self.vocab_size = tasks[0].vocab_size
        self.logits_rvv = np.zeros((len(tasks), self.vocab_size, self.vocab_size))
        self.entropy_rv, self.frequency_rv = (
            torch.from_numpy(np.stack([getattr(task, name) for task in tasks])) for name in ("entropy_v", "frequency_v")
        )
        self._tables_rvv = torch.from_numpy(np.stack([task.table_vv for task in tasks]))
        self._drawn: dict[int, NDArray[np.int64]] = {}

    def state(self) -> NDArray[np.float64]:
        """A copy of the logits; SGD has nothing else."""
        return self.logits_rvv.copy()

    def load(self, state: NDArray[np.float64]) -> None:
        """Put logits back."""
        self.logits_rvv = state.copy()

    def advance(self, step: int, factor: float) -> None:
        """One SGD step on batch `step`."""
        counts_rvv = self._counts(step)
        seen_rv1 = counts_rvv.sum(axis=2, keepdims=True)
        weights_rvv = np.exp(self.logits_rvv - self.logits_rvv.max(axis=2, keepdims=True))
        weights_rvv *= seen_rv1 / weights_rvv.sum(axis=2, keepdims=True)
        weights_rvv -= counts_rvv
        weights_rvv *= self.peak * factor / self.batch
        self.logits_rvv -= weights_rvv

    def look(self) -> TableLook:
        """Excess and losses now."""
        losses_rv = -(self._tables_rvv * torch.from_numpy(self.logits_rvv).log_softmax(-1)).sum(-1)
        share_v = 2 * (self.frequency_rv * (losses_rv - self.entropy_rv)).mean(0)
        half = self.vocab_size // 2
        certain, uncertain = float(share_v[:half].sum()), float(share_v[half:].sum())
        return TableLook(Excess((certain + uncertain) / 2, certain, uncertain), losses_rv)

    def _counts(self, step: int) -> NDArray[np.float64]:
        """How often each pair is in batch `step`, [r, v, v]."""
        if step not in self._drawn:
            self._draw(step)
        v, r = self.vocab_size, len(self.tasks)
        counts = np.bincount(self._drawn[step], minlength=r * v * v)
        return counts.reshape(r, v, v).astype(np.float64)

    def _draw(self, first: int) -> None:
        """The pairs of the next steps, as places in the flattened counts."""
        steps = np.arange(first, first + AHEAD)
        v = self.vocab_size
        places = np.empty((AHEAD, len(self.tasks), self.batch), dtype=np.int64)
        for r, task in enumerate(self.tasks):
            keys = key("train", self.seed, steps, np.full(AHEAD, r))
            contexts_bn, successors_bn = task.draw(keys, self.batch)
            places[:, r] = r * v * v + contexts_bn * v + successors_bn
        self._drawn = {int(step): places[i].ravel() for i, step in enumerate(steps)}
