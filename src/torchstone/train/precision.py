"""Precision and compilation: `auto` measures, on the real model and batch, what is fastest for the whole run.

bf16 autocast doubles the speed of wide models on processors with bf16 instructions and slows narrow ones down;
`torch.compile` gains a third but costs half a minute. So `auto` times a few steps of each precision and, where the
run is long enough for compiling to pay at all, of the best one compiled, and counts the compile time in. The choice is
recorded with the run, reused on resume, and pinned for all arms of a study, so that arithmetic never differs between
what is compared.

Pitfall: two runs that both say `auto` may choose differently on different machines; the record holds the choice and
the times that led to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from torchstone.errors import ConfigError
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import data_of, steps_of
from torchstone.train.module import TrainingModule
from torchstone.train.reference import open_reference

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

    def wrap(self, module: TrainingModule) -> nn.Module:
        """The module, compiled if so chosen."""
        if not self.compile:
            return module
        getattr(module.objective, "before_compile", lambda: None)()
        compiled: nn.Module = torch.compile(module)  # type: ignore[assignment]
        return compiled


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the seconds per step (and to compile) that led to it; empty if nothing was measured."""

    compute: Compute
    measured: dict[str, Any] = field(default_factory=dict)


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_compute(recipe: Recipe, device: torch.device | None = None) -> Compute:
    """The recipe's precision and compilation, measured where it says `auto`; see `measure_compute`."""
    return measure_compute(recipe, device).compute


def measure_compute(recipe: Recipe, device: torch.device | None = None, steps: int | None = None) -> Choice:
    """The recipe's precision and compilation, measured where it says `auto`.

    Args:
        recipe: complete recipe; its data is built if it is not there.
        device: where it will train; None takes the default.
        steps: updates that are still to come; None takes all of the budget.

    Raises:
        ConfigError: bf16 is asked for and the device does not have it, or `compile: true` and nothing compiles.
    """
    device = device or default_device()
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if recipe.precision == "bf16" and not has_bf16:
        raise ConfigError("precision: bf16 is not supported by this GPU; use fp32 or auto.")
    if recipe.precision != "auto" and recipe.compile != "auto":
        return Choice(Compute(recipe.precision, bool(recipe.compile)))
    precisions = [recipe.precision] if recipe.precision != "auto" else ["fp32", "bf16"][: 1 + has_bf16]
    steps = steps_of(recipe) if steps is None else steps
    passes = steps * recipe.batch.sequences / _rows(recipe)
    measured: dict[str, Any] = {}
    for precision in precisions:
        measured[precision] = _seconds(recipe, Compute(precision, False), device)[0]
    best = min(precisions, key=measured.__getitem__)
    if recipe.compile != "auto":
        return Choice(Compute(best, bool(recipe.compile)), measured)
    plain_total = measured[best] * passes
    if plain_total < COMPILE_WORTH_MEASURING:
        return Choice(Compute(best, False), measured)
    try:
        compiled, overhead = _seconds(recipe, Compute(best, True), device)
    except RuntimeError as error:  # no working compiler on this machine
        measured["compile_failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        return Choice(Compute(best, False), measured)
    measured |= {f"{best}_compiled": compiled, "compile_seconds": overhead}
    return Choice(Compute(best, overhead + compiled * passes < plain_total), measured)


def _rows(recipe: Recipe) -> int:
    """Sequences of one forward pass of a single process."""
    return min(recipe.batch.micro or recipe.batch.sequences, recipe.batch.sequences)


def _seconds(recipe: Recipe, compute: Compute, device: torch.device) -> tuple[float, float]:
    """Seconds of one forward and backward pass of a micro-batch, and what the first ones cost more (compiling)."""
    data = data_of(recipe)
    model = recipe.model.build(data.vocab_size, data.length, recipe.seed).to(device)
    objective: Any = recipe.objective.build()
    if (reference := open_reference(recipe, data)) is not None:
        objective.attach_reference(reference.model.to(device))
    step = compute.wrap(TrainingModule(model, objective))
    batch = data.batch(recipe.seed, 0, recipe.batch.sequences, 0, _rows(recipe)).to(device)

    def once() -> None:
        model.zero_grad(set_to_none=True)
        with compute.autocast(device):
            minimised, _ = step(batch)
        minimised.backward()

    times = [_timed(once, device) for _ in range(WARM_STEPS + TIMED_STEPS)]
    steady = min(times[WARM_STEPS:])
    return steady, sum(times[:WARM_STEPS]) - WARM_STEPS * steady


def _timed(work: Callable[[], None], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
