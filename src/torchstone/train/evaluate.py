"""Held-out loss: the same items every time, in evaluation mode, touching no training stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchstone.errors import DataError
from torchstone.train.distributed import World
from torchstone.train.precision import Compute

LARGEST_BATCH = 64


@torch.no_grad()
def evaluate(
    model: Any,
    objective: nn.Module,
    data: Any,
    sequences: int,
    rows: int,
    compute: Compute,
    world: World,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Metrics on held-out sequences.

    Args:
        model: the plain decoder (not compiled, so that evaluation compiles nothing).
        objective: computes the loss; one whose loss is not per token of the text says so in `per_token`.
        data: the data source.
        sequences: held-out sequences.
        rows: sequences per forward pass, at most 64.
        compute: precision.
        world: ranks share the batches.
        stopped: asked between batches, by all ranks together.

    Returns:
        `loss` (nats per target token), `accuracy` (of the most likely token) and, where the data knows its bytes
        per token, `bits_per_byte`; None if `stopped` said so before the end.

    Raises:
        DataError: no held-out sequence has a target.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    try:
        for index, batch in enumerate(data.evaluation(min(rows, LARGEST_BATCH), sequences)):
            if index % world.size == 0 and stopped():
                return None
            if index % world.size != world.rank:
                continue
            with compute.autocast(world.device):
                output = objective(model, world.place(batch))
            totals += torch.stack([output.loss_sum, output.count, output.correct_bt.sum()]).double()
    finally:
        model.train(was_training)
    loss_sum, count, correct = world.total(totals).tolist()
    if count == 0:
        raise DataError(
            f"the {sequences} held-out sequences have nothing that the objective scores; raise evaluation.sequences, or change "
            "the data's or the objective's settings."
        )
    loss = loss_sum / count
    found = {"loss": loss, "accuracy": correct / count}
    if data.bytes_per_token and getattr(objective, "per_token", True):
        found["bits_per_byte"] = loss / math.log(2) / data.bytes_per_token
    return found
