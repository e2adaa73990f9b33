"""Losses that layers leave beside the objective's: minimised with it, recorded apart from it, the same for any micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from tests.support.tiny import tiny_recipe
from torch import Tensor, nn

from torchstone.models.counts import count
from torchstone.nn.context import BuildContext
from torchstone.nn.span import Span
from torchstone.recipe import registry
from torchstone.recipe.load import load_recipe
from torchstone.recipe.part import Part
from torchstone.train.budget import counts_of
from torchstone.train.distributed import world
from torchstone.train.loop import Trainer
from torchstone.train.precision import Compute


class Leaving(nn.Module):
    """A feed-forward layer that leaves the mean square of its weight, and knows of parameters that a token does not use."""

    def __init__(self, width: int, coefficient: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, width))
        self.coefficient = coefficient

    def forward(self, x_btd: Tensor, span: Span) -> Tensor:
        span.leave(self.coefficient * self.w.square().mean())
        return x_btd @ self.w

    def flops(self) -> float:
        return 2.0 * self.w.numel()

    def inactive_parameters(self) -> int:
        return self.w.numel() // 2

    def activation_values(self) -> int:
        return 1000


class LeavingConfig(Part):
    family: ClassVar[str] = "feedforward"
    kind: Literal["t-leaving"] = "t-leaving"
    coefficient: float = 1.0

    def build(self, context: BuildContext) -> Leaving:
        return Leaving(context.width, self.coefficient)


@pytest.fixture(autouse=True)
def _kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry._registered, ("feedforward", "t-leaving"), LeavingConfig)
    yield


DATA: Any = load_recipe(tiny_recipe()).data.build(None)


def leaving(coefficient: float) -> dict[str, Any]:
    """The tiny model with that layer."""
    model: dict[str, Any] = tiny_recipe()["model"]
    model["block"]["feedforward"] = {"kind": "t-leaving", "coefficient": coefficient}
    return model


def step(coefficient: float, micro: int | None) -> tuple[dict[str, float], dict[str, Tensor]]:
    optimizer = {"kind": "adamw", "clip": None}
    batch = {"sequences": 4, "micro": micro}
    loaded = load_recipe(tiny_recipe(batch=batch, optimizer=optimizer, model=leaving(coefficient)))
    model = loaded.model.build(DATA.vocab_size, DATA.length, 0)
    with world(torch.device("cpu")) as peers:
        trainer = Trainer(loaded, model, DATA, Compute("fp32", False), peers, 3, counts_of(loaded))
        found = trainer.step()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_auxiliary_losses_are_recorded_apart_and_do_not_depend_on_micro_batches() -> None:
    (whole, gradients), (pieces, split) = step(2.0, None), step(2.0, 1)
    without, _ = step(0.0, None)
    assert whole["loss"] == without["loss"] and "auxiliary" not in without
    weights = 2 * 2.0 * 0.02**2  # two layers, std 0.02 (the residual scaling does not apply)
    assert whole["auxiliary"] == pytest.approx(weights, rel=0.2)
    assert pieces["auxiliary"] == pytest.approx(whole["auxiliary"], rel=1e-3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4)


def test_auxiliary_losses_have_gradients() -> None:
    (_, with_it), (_, without) = step(5.0, None), step(0.0, None)
    model = load_recipe(tiny_recipe(model=leaving(0.0))).model.build(DATA.vocab_size, DATA.length, 0)
    for name, value in model.named_parameters():
        left = 5.0 * 2 * value / value.numel() if name.endswith("feedforward.w") else torch.zeros_like(value)
        torch.testing.assert_close(with_it[name] - without[name], left, atol=1e-7, rtol=1e-3)


def test_counts_know_inactive_parameters_and_kept_values() -> None:
    recipe = tiny_recipe()
    plain = count(load_recipe(recipe).model, 20, 8)
    recipe["model"]["block"]["feedforward"] = {"kind": "t-leaving"}
    leaving = count(load_recipe(recipe).model, 20, 8)
    assert plain.active_parameters == plain.parameters
    assert leaving.parameters - leaving.active_parameters == 2 * 32 * 32 // 2
    attention = 4 * 2 * (32 + 32)
    assert leaving.activation_values_per_token == attention + 2 * 1000 + 32
