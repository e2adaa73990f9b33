"""Signal and noise of the gradient in the study of warmup, from two halves of batches that the run does not train on.

Averages of successive gradients do not tell it here: at the rates of these runs late gradients point against each other, so that
their average is smaller than noise alone would make it, and the estimate from moments is cut off at 0.

Gradients are taken by a twin of the model, so that the run and the meter on it see nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.diagnose.updates.series import LATE
from torchstone.diagnose.updates.snr import snr_of_halves
from torchstone.train.loop import Callback, RunView

EARLY_STEPS = (1, 3, 5)
LATE_SHARES = (LATE[0], sum(LATE) / 2, LATE[1])
FRESH = 500_000_000  # added to the run's seed for batches that it does not see


class FreshHalves(Callback):
    """Φ after a few early and late updates.

    Args:
        steps: of the run.
        batches: for each of those updates, each as large as the run's.
    """

    def __init__(self, steps: int, batches: int) -> None:
        self.late = tuple(round(share * steps) for share in LATE_SHARES)
        self.batches = batches
        self.twin: Any = None
        self.found: dict[int, float] = {}

    def on_step(self, view: RunView) -> None:
        """Measure, if it is one of those updates."""
        if view.position.step in {*EARLY_STEPS, *self.late}:
            self.found[view.position.step] = self._measure(view)

    def metrics(self) -> dict[str, float]:
        """Means over the early updates, over the late ones, and their difference; empty if the run ended before."""
        if set(self.found) != {*EARLY_STEPS, *self.late}:
            return {}
        early, late = (sum(map(self.found.__getitem__, steps)) / len(steps) for steps in (EARLY_STEPS, self.late))
        return {"signal_early": early, "signal_late": late, "signal_drop": early - late}

    def _measure(self, view: RunView) -> float:
        recipe = view.recipe
        if self.twin is None:
            self.twin = recipe.model.build(view.data.vocab_size, view.data.length, recipe.seed)
        device = next(view.model.parameters()).device
        twin = self.twin.to(device)
        twin.load_state_dict(view.model.state_dict())
        size = recipe.batch.sequences
        halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number in range(self.batches):
            step = view.position.step * self.batches + number
            for half, (start, stop) in zip(halves, ((0, size // 2), (size // 2, size)), strict=True):
                rows = range(start, stop, recipe.batch.micro or stop - start)
                pieces = [
                    view.data.batch(recipe.seed + FRESH, step, size, row, min(row + rows.step, stop)).to(device)
                    for row in rows
                ]
                half += self._gradient(view, twin, pieces)
        return snr_of_halves(*halves)

    def _gradient(self, view: RunView, twin: Any, pieces: list[Batch]) -> list[Tensor]:
        """The mean gradient of every matrix over some pieces of a batch, all of one size but the last."""
        objective, values = view.recipe.objective.build(), [value for value in twin.parameters() if value.dim() > 1]
        total: list[Tensor] = []
        targets = 0.0
        for piece in pieces:
            with view.compute.autocast(piece.tokens_bt.device), torch.enable_grad():
                output = objective(twin, piece)
            found = torch.autograd.grad(output.loss_sum, values)
            total = list(torch._foreach_add(total, found)) if total else list(found)
            targets += float(output.count)
        return list(torch._foreach_div(total, targets))
