"""The training loop: one step after another, nothing hidden.

A step: rows of the global batch → loss in micro-batches → gradients → finite? → clip → schedule → update → record.
The batch, the dropout stream and the schedule are functions of (seed, step), so that there is no state beside
weights, optimizer moments and counters, and resuming at step s is the same as never having stopped.

Losses are summed over micro-batches and ranks and divided by the number of targets in the global batch, so that
accumulation and world size change nothing but rounding where a step draws nothing. Dropout and the belief-state objective's
`pair_rate` below 1 draw from one stream for each rank, one micro-batch after the other: there another `batch.micro` or world size
means other draws, and another run of the same distribution.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.data.batch import Batch
from torchstone.errors import DataError, NonFiniteError
from torchstone.models.counts import Counts
from torchstone.recipe.schema import Recipe
from torchstone.storage.hashing import fingerprint_of
from torchstone.train.crash import write_bundle
from torchstone.train.distributed import World
from torchstone.train.evaluate import evaluate
from torchstone.train.events import Sink
from torchstone.train.hooks import ObjectiveHooks
from torchstone.train.module import TrainingModule
from torchstone.train.precision import Compute
from torchstone.train.progress import Reporter
from torchstone.train.signals import Stop


@dataclass
class Position:
    """How far a run is: everything a checkpoint needs beside tensors.

    Attributes:
        step: updates done. tokens: training tokens seen. flops: what they cost, each at the size that the model had.
        seconds: spent in steps, evaluations and saves left out.
        evaluated: step of the last evaluation, -1 before the first.
        peak_bytes: most memory of any process of the run so far.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    evaluated: int = -1
    peak_bytes: int = 0

    @classmethod
    def restored(cls, stored: Mapping[str, Any], counts: Counts) -> Position:
        """From a checkpoint; one without `flops` (of an older version) trained all its tokens at these counts."""
        return cls(**{"flops": stored["tokens"] * counts.training_flops_per_token, **stored})


@dataclass(frozen=True)
class RunView:
    """What a callback sees: the recipe, the live model and optimizer (not to be changed), the data, the position, the metrics,
    and the run directory."""

    recipe: Recipe
    model: Any
    data: Any
    position: Position
    compute: Compute
    metrics: Mapping[str, float]
    optimizer: torch.optim.Optimizer
    directory: Path


class Callback:
    """Base of callbacks. They may neither change weights nor draw from torch's default generator."""

    def on_start(self, view: RunView) -> None:
        """Called on every rank before the first update of this process; an error ends the run with nothing changed."""

    def on_step(self, view: RunView) -> Mapping[str, float] | None:
        """Called on every rank after an update; may return extra numbers for its record."""

    def on_evaluation(self, view: RunView) -> Mapping[str, float]:
        """Called on every rank after an evaluation; returns extra numbers for the validation record."""
        return {}


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
        self.objective: nn.Module = recipe.objective.build()
        self.optimizer: torch.optim.Optimizer = recipe.optimizer.build(model)
        self.schedule = recipe.schedule.build(steps)
        self.ends = frozenset(self.schedule.checkpoints())  # where a decayed state is there to be kept
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.clip: float | None = getattr(recipe.optimizer, "clip", None)
        self.hooks = ObjectiveHooks(self.objective, model, world)
        self.module = world.wrap(compute.wrap(TrainingModule(model, self.objective)))
        self.position = Position()

    @property
    def finished(self) -> bool:
        """True when the budget is spent."""
        return self.position.step >= self.steps

    def micro_rows(self) -> list[tuple[int, int]]:
        """This rank's rows of a global batch, in micro-batches."""
        start, stop = self.world.rows(self.recipe.batch.sequences)
        size = self.recipe.batch.micro or stop - start
        return [(row, min(row + size, stop)) for row in range(start, stop, size)]

    def step(self) -> dict[str, float]:
        """One update; returns `loss`, `gradient_norm` (before clipping), `learning_rate`, `angle` (radians) of a rotational
        optimizer, `auxiliary` where layers leave losses of their own, which is not part of `loss`, and what the objective adds.

        Raises:
            NonFiniteError: loss or gradient is not finite on any rank. DataError: the objective scores nothing in the
                global batch. Nothing has been updated.
        """
        seed, step, sequences = self.recipe.seed, self.position.step, self.recipe.batch.sequences
        batches = [self.data.batch(seed, step, sequences, *rows) for rows in self.micro_rows()]
        targets = sum(self.hooks.targets(batch) for batch in batches)
        count = self.world.total(torch.tensor(float(targets), device=self.world.device))
        if not float(count):
            raise DataError(self._nothing_scored(step))
        count = self.hooks.divisor(count)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, device=self.world.device)
        with dropout_stream(seed, step, self.world.rank, self.world.device):
            placed = self.hooks.planned(
                map(self.world.place, batches), lambda: self.compute.autocast(self.world.device)
            )
            for number, batch in enumerate(placed, start=1):
                sums += self._backward(batch, count, last=number == len(batches))
        norm = self._gradient_norm()
        minimised, loss = (self.world.total(sums) / count).tolist()
        found = {"loss": loss, "gradient_norm": float(norm)}
        if minimised != loss:
            found["auxiliary"] = minimised - loss
        if self.world.any(not all(map(math.isfinite, found.values()))):
            raise NonFiniteError(", ".join(f"{name.replace('_', ' ')} is {value}" for name, value in found.items()))
        self._clip(norm)
        factor = self.schedule.factor(step)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        self.optimizer.step()
        self.position.step += 1
        tokens = sequences * self.data.length
        self.position.tokens += tokens
        self.position.flops += tokens * self.counts.training_flops_per_token
        return {**found, **self.hooks.metrics(), **self._angle(), "learning_rate": self.peak_rates[0] * factor}

    def _backward(self, batch: Batch, count: Tensor, *, last: bool) -> Tensor:
        """Add the share of one micro-batch, on the device, to the gradient; ranks exchange gradients with the last one.

        Returns what is minimised and the loss, each summed over the micro-batch's targets.
        """
        quiet: AbstractContextManager[Any] = nullcontext()
        if self.world.size > 1 and not last:
            quiet = self.module.no_sync()  # type: ignore[operator]
        with quiet:
            with self.compute.autocast(self.world.device):
                minimised, loss_sum = self.module(batch)
            # DDP averages over ranks; the factor turns its mean into a sum
            (minimised * (self.world.size / count)).backward()
        return torch.stack([minimised.detach(), loss_sum])

    def _angle(self) -> dict[str, float]:
        """`angle`, the largest by which a rotational optimizer turns a row in this step; nothing for the others."""
        angles = [angle for angle in getattr(self.optimizer, "angles", list)() if angle is not None]
        return {"angle": max(angles)} if angles else {}

    def _nothing_scored(self, step: int) -> str:
        kind = self.recipe.objective.kind
        return (
            f"the objective {kind} scores nothing in the {self.recipe.batch.sequences} sequences of step {step}, so that there "
            "is no loss. Check that its settings fit the data: the ids of special tokens (fim_token, end_token), least gaps and "
            "context lengths, and whether the data writes what it looks for (fill-in-the-middle needs order: goal-first); or "
            "raise batch.sequences."
        )

    def _gradients(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.grad is not None]

    def _gradient_norm(self) -> Tensor:
        return nn.utils.get_total_norm([value.grad for value in self._gradients() if value.grad is not None])

    def _clip(self, norm: Tensor) -> None:
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self._gradients(), self.clip, norm)

    def evaluate(self, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Held-out metrics and the model's own numbers (λ per layer); None if it was stopped before the end."""
        rows = self.recipe.batch.micro or self.recipe.batch.sequences
        found = evaluate(
            self.model,
            self.objective,
            self.data,
            self.recipe.evaluation.sequences,
            rows,
            self.compute,
            self.world,
            stopped,
        )
        return None if found is None else {**found, **self.model.diagnostics()}

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
    save: Callable[[], object]
    stop: Stop
    _last: dict[str, float] = field(default_factory=dict)

    def run(self) -> bool:
        """Run on; returns True if the budget is spent and evaluated, False if a stop came first.

        Either way it leaves with a checkpoint at the last step reached, unless an error is raised.
        """
        trainer = self.trainer
        trainer.model.train()
        for callback in self.callbacks:
            callback.on_start(self._view({}))
        while True:
            if self._evaluation_is_due() and not self._evaluate():
                break
            if trainer.finished or self._asked():
                break
            self._step()
            if self._save_is_due():
                self.save()
        self.save()
        return trainer.finished and trainer.position.evaluated == trainer.position.step

    def _asked(self) -> bool:
        return self.trainer.world.any(bool(self.stop))

    def _save_is_due(self) -> bool:
        """At intervals, and where a decay ends, but not at the end of the run, which is saved once it is evaluated."""
        trainer, step = self.trainer, self.trainer.position.step
        due = _due(trainer.recipe.checkpoint.every, step) or step in trainer.ends
        return due and not trainer.finished

    def _evaluation_is_due(self) -> bool:
        trainer, position = self.trainer, self.trainer.position
        ended = trainer.finished or position.step in trainer.ends
        due = ended or _due(trainer.recipe.evaluation.every, position.step)
        return due and position.evaluated < position.step and position.step > 0

    def _step(self) -> None:
        trainer, position = self.trainer, self.trainer.position
        begun = time.perf_counter()
        try:
            self._last = trainer.step()
        except NonFiniteError as error:
            raise self._crash(f"at step {position.step} {error}; stopped before the update") from error
        seconds = time.perf_counter() - begun
        position.seconds += seconds
        position.peak_bytes = max(position.peak_bytes, peak_bytes(trainer.world.device))
        tokens = trainer.recipe.batch.sequences * trainer.data.length
        state = {"step": position.step, "steps": trainer.steps, "loss": self._last["loss"],
                 "tokens_per_second": tokens / seconds, "tokens_per_step": tokens}  # fmt: skip
        found = dict(self._last)
        for callback in self.callbacks:
            found |= callback.on_step(self._view(self._last)) or {}
        self._record("train", {**found, "tokens_per_second": state["tokens_per_second"]})
        self.report(state)

    def _evaluate(self) -> bool:
        found = self.trainer.evaluate(self._asked)
        if found is None:
            return False
        for callback in self.callbacks:
            found |= callback.on_evaluation(self._view(found))
        wrong = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
        if wrong:
            step = self.trainer.position.step
            raise self._crash(f"the evaluation after step {step} gives no number ({', '.join(wrong)})")
        self.trainer.position.evaluated = self.trainer.position.step
        self._record("validation", found)
        return True

    def _view(self, metrics: Mapping[str, float]) -> RunView:
        trainer = self.trainer
        return RunView(
            trainer.recipe, trainer.model, trainer.data, trainer.position, trainer.compute, metrics,
            trainer.optimizer, self.directory,
        )  # fmt: skip

    def _crash(self, what: str) -> NonFiniteError:
        """The error to raise, after the leading rank has written a bundle."""
        trainer, step = self.trainer, self.trainer.position.step
        context = {"what": what, "seed": trainer.recipe.seed, "tokens": trainer.position.tokens,
                   "world": trainer.world.size, "last_metrics": self._last}  # fmt: skip
        path = self.directory / "crash" / f"step-{step:08d}.json"
        if trainer.world.leads:
            write_bundle(path, step, trainer.model, trainer.documents(), context)
        return NonFiniteError(
            f"{what}. The weights are those after {step} updates. {path} holds the documents of the batch and the norms "
            "of parameters and gradients; look at them, or train into another directory with a lower "
            "optimizer.learning_rate."
        )

    def _record(self, kind: str, metrics: Mapping[str, float]) -> None:
        trainer, position = self.trainer, self.trainer.position
        if not trainer.world.leads:
            return
        axes = {name: getattr(position, name) for name in ("step", "tokens", "seconds", "flops")}
        for sink in self.sinks:
            sink.write({"kind": kind, **axes, **metrics})


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


@contextmanager
def dropout_stream(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's default generator is a stream of its own for (seed, step, rank); outside it is untouched."""
    everywhere = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=everywhere):
        torch.manual_seed(int(fingerprint_of(["dropout", seed, step, rank])[:15], 16))
        yield


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
