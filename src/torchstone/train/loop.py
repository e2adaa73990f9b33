"""The training loop: one step after another, nothing hidden.

A step: rows of the global batch → loss in micro-batches → gradients → finite? → clip → schedule → update → record.
The batch, the dropout stream and the schedule are functions of (seed, step), so that there is no state beside weights,
optimizer moments and counters, and resuming at step s is the same as never having stopped.

Losses are summed over micro-batches and ranks and divided by the number of targets in the global batch, so that
accumulation and world size change nothing but rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from torchstone.data.batch import IGNORE
from torchstone.errors import NonFiniteError
from torchstone.models.counts import Counts
from torchstone.recipe.schema import Recipe
from torchstone.storage.hashing import fingerprint_of
from torchstone.train.crash import write_bundle
from torchstone.train.distributed import World
from torchstone.train.evaluate import evaluate
from torchstone.train.events import Sink
from torchstone.train.module import TrainingModule
from torchstone.train.precision import Compute
from torchstone.train.progress import Reporter
from torchstone.train.signals import Stop


@dataclass
class Position:
    """How far a run is. Everything a checkpoint needs beside tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    taints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunView:
    """What a callback sees: the recipe, the live model (do not change it), the data and the position."""

    recipe: Recipe
    model: Any
    data: Any
    position: Position
    compute: Compute


class Callback(Protocol):
    """Measures something while a run goes on. It may not change weights or draw from torch's generator."""

    def on_evaluation(self, view: RunView) -> Mapping[str, float]:
        """Extra numbers for the validation record."""


class Trainer:
    """One run in memory: model, optimizer, data and where it stands.

    Args:
        recipe: complete recipe.
        model: the decoder on the right device.
        data: the data source.
        compute: precision and compilation.
        world: this process among its peers.
        steps: updates of the whole run.
        counts: parameters and FLOPs of the model.
    """

    def __init__(
        self, recipe: Recipe, model: Any, data: Any, compute: Compute, world: World, steps: int, counts: Counts
    ) -> None:
        self.recipe, self.model, self.data, self.compute, self.world = recipe, model, data, compute, world
        self.steps, self.counts = steps, counts
        self.objective: nn.Module = recipe.objective.build()  # type: ignore[attr-defined]
        self.optimizer: torch.optim.Optimizer = recipe.optimizer.build(model)  # type: ignore[attr-defined]
        self.schedule = recipe.schedule.build(steps)  # type: ignore[attr-defined]
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.clip: float | None = getattr(recipe.optimizer, "clip", None)
        self.module = world.wrap(compute.wrap(TrainingModule(model, self.objective)))
        self.position = Position()

    def micro_rows(self) -> list[tuple[int, int]]:
        """This rank's rows of a global batch, in micro-batches."""
        start, stop = self.world.rows(self.recipe.batch.sequences)
        size = self.recipe.batch.micro or stop - start
        return [(row, min(row + size, stop)) for row in range(start, stop, size)]

    def step(self) -> dict[str, float]:
        """One update; returns `loss`, `gradient_norm` and `learning_rate`.

        Raises:
            NonFiniteError: loss or gradient is not finite on any rank; nothing has been updated.
        """
        step, sequences = self.position.step, self.recipe.batch.sequences
        batches = [self.data.batch(self.recipe.seed, step, sequences, *rows) for rows in self.micro_rows()]
        count = torch.tensor(float(sum(int((batch.targets_bt != IGNORE).sum()) for batch in batches)), device=self.world.device)
        count = self.world.total(count)
        loss_sum = torch.zeros((), device=self.world.device)
        self.optimizer.zero_grad(set_to_none=True)
        with dropout_stream(self.recipe.seed, step, self.world.rank, self.world.device):
            for index, batch in enumerate(batches):
                loss_sum += self._backward(batch, count, last=index == len(batches) - 1)
        norm = self._gradient_norm()
        loss = self.world.total(loss_sum) / count
        found = {"loss": float(loss), "gradient_norm": float(norm)}
        if self.world.any(not all(map(math.isfinite, found.values()))):
            raise NonFiniteError("; ".join(f"{name} is {value}" for name, value in found.items()))
        factor = self.schedule.factor(step)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        self.position.step += 1
        self.position.tokens += sequences * self.data.length
        return {**found, "learning_rate": self.peak_rates[0] * factor}

    def _backward(self, batch: Any, count: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Add one micro-batch's share of the gradient; ranks exchange gradients with the last one."""
        batch = batch.to(self.world.device)
        with self._without_exchange(not last), self.compute.autocast(self.world.device):
            loss_sum, _, _ = self.module(batch)
            # DDP averages over ranks; the factor turns its mean into a sum
            (loss_sum * (self.world.size / count)).backward()
        return loss_sum.detach()

    @contextmanager
    def _without_exchange(self, skip: bool) -> Iterator[None]:
        if skip and self.world.size > 1:
            with self.module.no_sync():  # type: ignore[operator]
                yield
        else:
            yield

    def _gradient_norm(self) -> torch.Tensor:
        """The global gradient norm, after clipping to `clip` if there is one (the norm before is returned)."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.clip is not None and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return norm

    def evaluate(self) -> dict[str, float]:
        """Held-out metrics and the model's own numbers (λ per layer)."""
        rows = self.recipe.batch.micro or self.recipe.batch.sequences
        found = evaluate(
            self.model, self.objective, self.data, self.recipe.evaluation.sequences, rows, self.compute, self.world
        )
        return {**found, **self.model.diagnostics()}

    def documents(self) -> Sequence[Any]:
        """The documents of the current step's batch."""
        return self.data.documents(self.recipe.seed, self.position.step, self.recipe.batch.sequences)


@dataclass
class Loop:
    """Steps, evaluations and saves until the budget is spent or a stop is asked for."""

    trainer: Trainer
    directory: Path
    sinks: Sequence[Sink]
    callbacks: Sequence[Callback]
    report: Reporter
    save: Any
    stop: Stop

    def run(self) -> None:
        """Run to the end of the budget. Leaves with a checkpoint at the last step reached, unless an error is raised."""
        trainer, recipe = self.trainer, self.trainer.recipe
        trainer.model.train()
        begun = time.perf_counter() - trainer.position.seconds
        first, first_at = trainer.position.step, time.perf_counter()
        while trainer.position.step < trainer.steps and not trainer.world.any(bool(self.stop)):
            metrics = self._step()
            trainer.position.seconds = time.perf_counter() - begun
            step = trainer.position.step
            speed = (step - first) * recipe.batch.sequences * trainer.data.length / (time.perf_counter() - first_at)
            self._record("train", {**metrics, "tokens_per_second": speed})
            per_step = recipe.batch.sequences * trainer.data.length
            self.report({"step": step, "steps": trainer.steps, "loss": metrics["loss"], "tokens_per_second": speed,
                         "tokens_per_step": per_step})
            if _due(recipe.evaluation.every, step) and step < trainer.steps:
                self._evaluate()
            if _due(recipe.checkpoint.every, step) and step < trainer.steps:
                self.save()
            trainer.position.seconds = time.perf_counter() - begun
        trainer.position.peak_bytes = max(trainer.position.peak_bytes, peak_bytes(trainer.world.device))
        if trainer.position.step >= trainer.steps:
            self._evaluate()
        self.save()

    def _step(self) -> dict[str, float]:
        trainer = self.trainer
        try:
            return trainer.step()
        except NonFiniteError as error:
            step = trainer.position.step
            context = {"seed": trainer.recipe.seed, "tokens": trainer.position.tokens, "rank": trainer.world.rank}
            path = write_bundle(self.directory, step, str(error), trainer.model, trainer.documents(), context) if trainer.world.leads else None
            raise NonFiniteError(
                f"at step {step} {error}; stopped before the update. What led there is in {path or self.directory / 'crash'}; lower "
                "optimizer.learning_rate, or look at the documents of that step."
            ) from error

    def _evaluate(self) -> None:
        trainer = self.trainer
        found = trainer.evaluate()
        view = RunView(trainer.recipe, trainer.model, trainer.data, trainer.position, trainer.compute)
        for callback in self.callbacks:
            found |= callback.on_evaluation(view)
        self._record("validation", found)

    def _record(self, kind: str, metrics: Mapping[str, float]) -> None:
        position = self.trainer.position
        axes = {"step": position.step, "tokens": position.tokens, "seconds": position.seconds,
                "flops": position.tokens * self.trainer.counts.training_flops_per_token}
        if self.trainer.world.leads:
            for sink in self.sinks:
                sink.write({"kind": kind, **axes, **metrics})


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


@contextmanager
def dropout_stream(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Inside the block torch's default generator is a stream of its own for (seed, step, rank); outside it is untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(fingerprint_of(["dropout", seed, step, rank])[:15], 16))
        yield


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
