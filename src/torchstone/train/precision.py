"""Precision and compilation: `auto` measures, on the real model and batch, what is fastest for the whole run.

bf16 autocast doubles the speed of wide models on processors with bf16 instructions and slows narrow ones down;
`torch.compile` gains a third but costs half a minute. So `auto` times a few steps of each candidate and adds the compile
time spread over the run. The choice is recorded with the run, reused on resume, and pinned for all arms of a study, so
that arithmetic never differs between what is compared.

Pitfall: two runs that both say `auto` may choose differently on different machines; the fingerprint of a cell holds the
choice, not the word.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from torchstone.errors import ConfigError
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import steps_of
from torchstone.train.module import TrainingModule

WARM_STEPS, TIMED_STEPS = 2, 3
COMPILE_WORTH_MEASURING = 300.0  # seconds of training below which compiling cannot pay


@dataclass(frozen=True)
class Compute:
    """How the arithmetic runs: `precision` fp32 or bf16, and whether the step is compiled."""

    precision: str
    compile: bool

    def data(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of forward passes."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, compiled if so chosen."""
        return torch.compile(module) if self.compile else module  # type: ignore[return-value]


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_supported(recipe: Recipe, device: torch.device) -> None:
    """Raise ConfigError if the recipe asks for a precision that the device does not have."""
    if recipe.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: bf16 is not supported by this GPU; use fp32 or auto.")


def choose_compute(recipe: Recipe, device: torch.device | None = None) -> Compute:
    """The recipe's precision and compilation, measured where it says `auto`.

    Args:
        recipe: complete recipe; its data is built if it is not there.
        device: where it will train; None takes the default.
    """
    device = device or default_device()
    require_supported(recipe, device)
    if recipe.precision != "auto" and recipe.compile != "auto":
        return Compute(recipe.precision, recipe.compile)
    precisions = ["fp32", "bf16"] if recipe.precision == "auto" else [recipe.precision]
    steps = steps_of(recipe)
    plain = {precision: _seconds(recipe, Compute(precision, False), device)[0] for precision in precisions}
    best = min(plain, key=plain.__getitem__)
    if recipe.compile != "auto":
        return Compute(best, recipe.compile)
    if plain[best] * steps < COMPILE_WORTH_MEASURING:
        return Compute(best, False)
    per_step, overhead = _seconds(recipe, Compute(best, True), device)
    return Compute(best, overhead + per_step * steps < plain[best] * steps)


def _seconds(recipe: Recipe, compute: Compute, device: torch.device) -> tuple[float, float]:
    """Seconds of one forward and backward pass, and of the first two (compilation)."""
    data = recipe.data.build(None)
    model = recipe.model.build(data.vocab_size, data.length, recipe.seed).to(device)
    step = compute.wrap(TrainingModule(model, recipe.objective.build()))
    rows = min(recipe.batch.micro or recipe.batch.sequences, recipe.batch.sequences)
    batch = data.batch(recipe.seed, 0, recipe.batch.sequences, 0, rows).to(device)
    times = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        _synchronise(device)
        begun = time.perf_counter()
        with compute.autocast(device):
            loss_sum, _, _ = step(batch)
        loss_sum.backward()
        _synchronise(device)
        times.append(time.perf_counter() - begun)
    return min(times[WARM_STEPS:]), sum(times[:WARM_STEPS])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
