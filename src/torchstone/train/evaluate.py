"""Held-out loss: the same items every time, in evaluation mode, touching no training stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torchstone.train.loop import Trainer

LARGEST_BATCH = 64


@torch.no_grad()
def evaluate(
    trainer: Trainer, sequences: int, rows: int, stopped: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Metrics on held-out sequences, with the plain model (so that evaluation compiles nothing).

    Args:
        trainer: whose model, objective, data, precision and world are used; ranks share the batches.
        sequences: held-out sequences.
        rows: sequences per forward pass, at most 64.
        stopped: asked between batches, by all ranks together.

    Returns:
        `loss` (nats per target token), `accuracy` (of the most likely token) and, where the data knows its bytes
        per token, `bits_per_byte`; None if `stopped` said so before the end.
    """
    model, data, world = trainer.model, trainer.data, trainer.world
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    try:
        for index, batch in enumerate(data.evaluation(min(rows, LARGEST_BATCH), sequences)):
            if index % world.size == 0 and stopped():
                return None
            if index % world.size != world.rank:
                continue
            with trainer.compute.autocast(world.device):
                output = trainer.objective(model, world.place(batch))
            totals += torch.stack([output.loss_sum, output.count, output.correct_bt.sum()]).double()
    finally:
        model.train(was_training)
    loss_sum, count, correct = world.total(totals).tolist()
    loss = loss_sum / count
    found = {"loss": loss, "accuracy": correct / count}
    if data.bytes_per_token:
        found["bits_per_byte"] = loss / math.log(2) / data.bytes_per_token
    return found
