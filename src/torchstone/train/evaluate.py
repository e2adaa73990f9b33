"""Held-out loss: the same items every time, in evaluation mode, touching no training stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from torchstone.train.distributed import World
from torchstone.train.precision import Compute

LARGEST_BATCH = 64


@torch.no_grad()
def evaluate(
    model: Any, objective: nn.Module, data: Any, sequences: int, rows: int, compute: Compute, world: World
) -> dict[str, float]:
    """Metrics on held-out sequences.

    Args:
        model: the plain decoder (not compiled, so that evaluation compiles nothing).
        objective: computes the loss.
        data: the data source.
        sequences: held-out sequences.
        rows: sequences per forward pass.
        compute: precision.
        world: ranks share the batches.

    Returns:
        `loss` (nats per target token), `accuracy` (greedy, on targets) and, where the data knows its bytes per token,
        `bits_per_byte`.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    try:
        for index, batch in enumerate(data.evaluation(min(rows, LARGEST_BATCH), sequences)):
            if index % world.size != world.rank:
                continue
            batch = batch.to(world.device)
            with compute.autocast(world.device):
                output = objective(model, batch)
            totals += torch.tensor([float(output.loss_sum), float(output.count), float(output.correct_bt.sum())])
    finally:
        model.train(was_training)
    totals = world.total(totals.to(world.device if world.device.type == "cuda" else "cpu"))
    loss, count, correct = totals.tolist()
    found = {"loss": loss / count, "accuracy": correct / count}
    if data.bytes_per_token:
        found["bits_per_byte"] = loss / count / math.log(2) / data.bytes_per_token
    return found
