"""What enlarging a model did to its function: sizes, loss and logits before and after, on one batch.

    change = max |logits after − logits before| / max |logits before|

A growth that keeps the function changes logits by rounding only. The loss is the mean cross-entropy of the batch's targets.

Pitfall: a batch of random tokens (the default) shows whether the function changed, not what the change costs on text; give
a batch of held-out data for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.nn.initialisation import generator_for
from torchstone.nn.span import Span

JUMP = 1e-3  # difference of losses that is worth a warning
ROWS, LENGTH = 2, 64


@dataclass(frozen=True)
class Reading:
    """A model's loss and logits [b, t, v] on a batch, its parameters, and its FLOPs per training token."""

    loss: float
    logits_btv: Tensor
    parameters: int
    flops: float


@dataclass(frozen=True)
class GrowthReport:
    """What a growth did.

    Attributes:
        unit: what was appended: `parameter tokens` or `hidden units`.
        sizes: name of each enlarged layer → number of units before and after.
        settings: how the new units were made.
        parameters, flops_per_token: of the model, before and after; FLOPs of a training token at the model's length.
        loss: mean cross-entropy on the batch, before and after.
        change: largest difference of a logit, as a share of the largest logit before.
        batch: what the two were measured on.
        optimizer_carried: whether an optimizer's state was taken along.
    """

    unit: str
    sizes: Mapping[str, tuple[int, int]]
    settings: Mapping[str, Any]
    parameters: tuple[int, int]
    flops_per_token: tuple[float, float]
    loss: tuple[float, float]
    change: float
    batch: str
    optimizer_carried: bool

    @property
    def jump(self) -> float:
        """Loss after minus loss before."""
        return self.loss[1] - self.loss[0]

    @property
    def warning(self) -> str | None:
        """A sentence if the loss moved by more than `JUMP`, else None."""
        if abs(self.jump) <= JUMP:
            return None
        return (
            f"growth moved the loss by {self.jump:+.4f} nats ({self.loss[0]:.4f} to {self.loss[1]:.4f} on {self.batch}); "
            "zero keys with the scale kept (keys zero, tau fixed) keep the function."
        )

    def data(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "unit": self.unit,
            "sizes": {name: list(sizes) for name, sizes in self.sizes.items()},
            "settings": dict(self.settings),
            "parameters": list(self.parameters),
            "flops_per_token": list(self.flops_per_token),
            "loss": list(self.loss),
            "change": self.change,
            "batch": self.batch,
            "optimizer_carried": self.optimizer_carried,
        }

    def lines(self) -> list[str]:
        """The report for a person."""
        by_size: dict[tuple[int, int], int] = {}
        for sizes in self.sizes.values():
            by_size[sizes] = by_size.get(sizes, 0) + 1
        grown = ", ".join(f"{before} to {after} in {count} layers" for (before, after), count in by_size.items())
        state = "carried, with zeros for what is new" if self.optimizer_carried else "none given"
        return [
            f"{self.unit:<18}{grown}",
            f"{'new values':<18}{', '.join(f'{name} {value}' for name, value in self.settings.items())}",
            f"{'parameters':<18}{self.parameters[0]:,} to {self.parameters[1]:,}",
            f"{'FLOPs per token':<18}{self.flops_per_token[0]:,.0f} to {self.flops_per_token[1]:,.0f}",
            f"{'loss':<18}{self.loss[0]:.6f} to {self.loss[1]:.6f} on {self.batch}",
            f"{'logits':<18}largest change {self.change:.3g} of the largest logit",
            f"{'optimizer':<18}{state}",
        ]


def random_batch(model: Any, seed: int) -> Batch:
    """Token ids that mean nothing, for models without data at hand."""
    length = min(LENGTH, model.length)
    generator = generator_for(seed, "growth probe")
    tokens = torch.randint(model.vocab_size, (ROWS, length + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:])


@torch.no_grad()
def read(model: Any, batch: Batch) -> Reading:
    """The model's reading on a batch, in evaluation mode; its mode is left as it was."""
    batch = batch.to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        hidden_btd = model(batch.tokens_bt, Span(batch.positions_bt, batch.documents_bt)).hidden_btd
        logits_btv = model.logits(hidden_btd).float()
    finally:
        model.train(training)
    loss = F.cross_entropy(logits_btv.flatten(0, -2), batch.targets_bt.flatten(), ignore_index=IGNORE)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Reading(float(loss), logits_btv, parameters, 3 * float(model.flops(model.length)))


def compare(
    before: Reading,
    after: Reading,
    unit: str,
    sizes: Mapping[str, tuple[int, int]],
    settings: Mapping[str, Any],
    batch: str,
    optimizer_carried: bool,
) -> GrowthReport:
    """The report of two readings on the same batch."""
    largest = float(before.logits_btv.abs().max())
    change = float((after.logits_btv - before.logits_btv).abs().max()) / largest if largest > 0 else 0.0
    return GrowthReport(
        unit=unit,
        sizes=sizes,
        settings=settings,
        parameters=(before.parameters, after.parameters),
        flops_per_token=(before.flops, after.flops),
        loss=(before.loss, after.loss),
        change=change,
        batch=batch,
        optimizer_carried=optimizer_carried,
    )
