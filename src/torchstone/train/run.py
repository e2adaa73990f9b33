"""Train a recipe into a run directory, resume it, and load what it left.

    RUN/recipe.yaml       the recipe as resolved
        run.json          see `torchstone.train.record`
        metrics.jsonl     append-only curves
        checkpoints/      see `torchstone.train.checkpoint`
        summary.json      written last: the run is finished
        crash/            bundles of steps whose loss or gradient was not finite

The same call continues an interrupted run and returns at once from a finished one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import BudgetError, CheckpointError, ConfigError, DataError, InterruptedRun
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.storage.atomic import atomic_write
from torchstone.storage.names import safe_text
from torchstone.train.budget import check_phases, counts_of, data_of, steps_of
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.distributed import World, world
from torchstone.train.events import AXES, METRICS, RunIdentity, Sink, make_sinks, read_history
from torchstone.train.loop import Callback, Loop, Position, Trainer
from torchstone.train.names import RECIPE, RECORD, require_outside, require_run
from torchstone.train.precision import Choice, Compute, measure_compute
from torchstone.train.preflight import check_run, check_tokens
from torchstone.train.progress import Reporter, TrainingProgress
from torchstone.train.record import RunRecord, continue_run, read_record, start_run
from torchstone.train.reference import Reference, open_reference
from torchstone.train.resume import training_environment
from torchstone.train.signals import Stop, stop_on_signals
from torchstone.train.state import optimizer_tensors, restore_model, restore_optimizer

SUMMARY = "summary.json"
COUNTED = ("steps", "tokens", "flops", "seconds", "parameters", "peak_bytes")


@dataclass(frozen=True)
class RunSummary:
    """A finished run.

    Attributes:
        steps, tokens, flops, seconds, parameters, peak_bytes: what it was and what it cost; seconds are those of
            training steps, evaluations and saves left out.
        final: metrics at the end: `train_loss` (mean of the last tenth of the steps), `validation_loss`,
            `accuracy`, ….
        history: `train` and `validation` curves against steps, tokens, flops and seconds.
        directory: the run directory.
        checkpoint: folder of the last checkpoint.
        environment: what bitwise equality depends on, and precision and compilation, as the run was started.
        taints: what makes the run less than clean (changed data).
    """

    steps: int
    tokens: int
    flops: float
    seconds: float
    parameters: int
    peak_bytes: int
    final: Mapping[str, float]
    history: Mapping[str, Mapping[str, Sequence[Any]]]
    directory: Path
    checkpoint: Path
    environment: Mapping[str, Any] = field(default_factory=dict)
    taints: tuple[str, ...] = ()


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    directory: str | Path,
    *,
    resume: bool = True,
    fallback: bool = False,
    allow: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    progress: Reporter | None = None,
    compute: Compute | None = None,
    device: torch.device | None = None,
    stop: Stop | None = None,
) -> RunSummary:
    """Train `recipe` into `directory`, or continue what is there.

    Args:
        recipe: a recipe, a YAML file or plain data.
        directory: the run directory.
        resume: False refuses a directory that holds a run.
        fallback: if the newest checkpoint is damaged, use the newest intact one.
        allow: sections whose change since the start is accepted on resume (`optimizer`, `data`).
        callbacks: extra measurements at evaluations and steps.
        progress: receives every step; None shows a bar on a terminal and lines elsewhere.
        compute: precision and compilation; None takes the recipe's (measured where it says `auto`).
        device: None takes the first GPU, else the CPU.
        stop: ask it to stop from another thread; signals set it too.

    Raises:
        InterruptedRun: a stop was asked for; the checkpoint is complete and the same call continues.
        NonFiniteError, ConfigError, DataError, CheckpointError, BudgetError, DependencyError: see their classes.
    """
    recipe, directory = load_recipe(recipe), Path(directory)
    with world(device) as peers, stop_on_signals(Stop() if stop is None else stop) as asked:
        done = _finished(recipe, directory)
        if done is not None and resume:
            return done
        run = _Run(recipe, directory, peers, asked)
        run.open(resume, allow, compute)
        trainer = run.restore(fallback)
        run.loop(trainer, callbacks, progress)
        return run.summarise(trainer)


class _Run:
    """One call of `train`."""

    record: RunRecord
    reference: Reference | None

    def __init__(self, recipe: Recipe, directory: Path, peers: World, stop: Stop) -> None:
        self.recipe, self.directory, self.world, self.stop = recipe, directory, peers, stop
        self.steps, self.counts = steps_of(recipe), counts_of(recipe)
        ends = recipe.schedule.build(self.steps).checkpoints()
        self.store = CheckpointStore(directory / "checkpoints", recipe.checkpoint.keep, self._say, protected=ends)

    def open(self, resume: bool, allow: Sequence[str], compute: Compute | None) -> None:
        """Check, build the data, and start the run's record or find that this call may continue it."""
        check_run(self.recipe, self.counts, self.world, self.store)
        self._check_budget()
        self.data = self._build_data()
        check_tokens(self.recipe, self.data)
        if hasattr(self.recipe.objective, "check_batch"):  # what the objective reads is there, or is asked for now
            self.recipe.objective.check_batch(self.data.batch(self.recipe.seed, 0, self.recipe.batch.sequences, 0, 1))
        there = (self.directory / RECORD).exists()
        stepped = bool(self.store.steps()) or (self.directory / METRICS).exists()
        bound = read_record(self.directory).reference if there and stepped else None
        self.reference = open_reference(self.recipe, self.data, bound)
        fingerprint = self.reference.with_data(self.data.fingerprint) if self.reference else self.data.fingerprint
        next(iter(self.data.evaluation(1, self.recipe.evaluation.sequences)))  # too little held-out data fails now
        self.world.barrier()  # every rank has looked before the leading one writes
        if there and not resume:
            raise ConfigError(f"{self.directory} holds a run already; resume it, or choose another directory.")
        if not there or not stepped:
            require_outside(self.directory)
            self.record = start_run(
                self.directory, self.recipe, fingerprint, self.world,
                lambda: Choice(compute) if compute else measure_compute(self.recipe, self.world.device), self.reference,
            )  # fmt: skip
            return
        check_phases(load_recipe(self.directory / RECIPE), self.recipe, max(self.store.steps(), default=0))
        self.record, changes = continue_run(self.directory, self.recipe, fingerprint, self.world, allow, self.reference)
        self.store.protected |= frozenset(self.record.ends)
        for line in changes.lines():
            self._say(f"note: {line}")

    def _check_budget(self) -> None:
        """Raise BudgetError for a run that starts behind the end of its budget, as a grown one may."""
        done = max(self.store.steps(), default=0)
        if done >= self.steps and not read_history(self.directory)[0]["train"]["loss"]:
            raise BudgetError(
                f"{self.directory} stands at step {done} without a training step of its own on record, and its budget ends at "
                f"step {self.steps}: there is nothing to train. A grown run counts the steps before growth too: give a budget "
                f"that ends later, budget.steps=N with N above {done}. If {METRICS} was lost, restore it."
            )

    def _build_data(self) -> Any:
        """The data source; the leading rank builds it, the others then open what it built."""
        if not self.world.leads:
            self.world.barrier()
        source = data_of(self.recipe)
        if self.world.leads:
            self.world.barrier()
        return source

    def restore(self, fallback: bool) -> Trainer:
        """The trainer, at the newest checkpoint if there is one."""
        vocab_size, length, seed = self.data.vocab_size, self.data.length, self.recipe.seed
        model = self.recipe.model.build(vocab_size, length, seed).to(self.world.device)
        compute = Compute(**self.record.compute)
        trainer = Trainer(self.recipe, model, self.data, compute, self.world, self.steps, self.counts)
        if self.reference is not None:
            trainer.hooks.objective.attach_reference(self.reference.model.to(self.world.device))
        if not self.store.steps():
            return trainer
        snapshot = self.store.load(fallback=fallback)
        if "model" not in snapshot.tensors or not {"optimizer", "position"} <= snapshot.data.keys():
            raise CheckpointError(
                f"{self.store.path(snapshot.step)} is intact but no training checkpoint (it lacks the model, the optimizer or "
                "the position); train into another directory."
            )
        restore_model(model, snapshot.tensors["model"])
        asked = [{**group} for group in trainer.optimizer.param_groups]
        restore_optimizer(trainer.optimizer, snapshot.tensors.get("optimizer", {}), snapshot.data["optimizer"])
        for group, settings in zip(trainer.optimizer.param_groups, asked, strict=True):
            # the recipe's settings, which `allow` may have let change, not the checkpoint's
            group.update({name: value for name, value in settings.items() if name in trainer.optimizer.defaults})
        trainer.position = Position.restored(snapshot.data["position"], self.counts)
        return trainer

    def loop(self, trainer: Trainer, callbacks: Sequence[Callback], progress: Reporter | None) -> None:
        """Train to the end of the budget; raises InterruptedRun if a stop was asked for before."""
        shown = TrainingProgress(safe_text(self.directory.name)) if progress is None and self.world.leads else None
        sinks = self._sinks(trainer.position.step)
        report: Reporter = progress or shown or (lambda state: None)
        loop = Loop(trainer, self.directory, sinks, callbacks, report, lambda: self._save(trainer), self.stop)
        try:
            complete = loop.run()
        finally:
            if shown is not None:
                shown.close()
            for sink in sinks:
                sink.close()
        if not complete:
            raise InterruptedRun(
                f"stopped by {self.stop.reason or 'another rank'} after step {trainer.position.step} of {self.steps}; "
                "the checkpoint is complete. The same command continues."
            )

    def _sinks(self, step: int) -> list[Sink]:
        if not self.world.leads:
            return []
        identity = RunIdentity(self.directory, self.record.id, self.recipe.data_dict(), step)
        return make_sinks(self.recipe.sinks, identity)

    def _save(self, trainer: Trainer) -> None:
        """Save the run; the leading rank writes, the others wait."""
        if self.world.leads:
            tensors, plain = optimizer_tensors(trainer.optimizer)
            groups = {"model": dict(trainer.model.state_dict()), "optimizer": tensors}
            data = {
                "position": asdict(trainer.position),
                "optimizer": plain,
                "fingerprint": self.record.fingerprint,
                "data": self.record.data,
                "environment": training_environment(self.world),
            }
            self.store.save(Snapshot(trainer.position.step, groups, data))
        self.world.barrier()

    def summarise(self, trainer: Trainer) -> RunSummary:
        """Write `summary.json`, the sign of a finished run, and return its content with the curves."""
        position = trainer.position
        values = (
            position.step,
            position.tokens,
            position.flops,
            position.seconds,
            self.counts.parameters,
            position.peak_bytes,
        )
        if self.world.leads:
            content = json.dumps(dict(zip(COUNTED, values, strict=True)), indent=1)
            atomic_write(self.directory / SUMMARY, content + "\n")
        self.world.barrier()
        return _summary(self.directory, self.record, dict(zip(COUNTED, values, strict=True)))

    def _say(self, text: str) -> None:
        if self.world.leads:
            print(safe_text(text), file=sys.stderr, flush=True)


def _finished(recipe: Recipe, directory: Path) -> RunSummary | None:
    """The summary of a run that is finished under this very recipe; None if it is not, or its summary is damaged."""
    path = directory / SUMMARY
    if not path.exists() or load_recipe(directory / RECIPE) != recipe:
        return None
    try:
        counted = json.loads(path.read_bytes())
        steps = {name: counted[name] for name in COUNTED}["steps"]
    except (ValueError, KeyError, TypeError):
        return None
    return _summary(directory, read_record(directory), counted) if steps >= steps_of(recipe) else None


def _summary(directory: Path, record: RunRecord, counted: Mapping[str, Any]) -> RunSummary:
    history, warnings = read_history(directory, counted["steps"])
    for warning in warnings:
        print(f"warning: {safe_text(warning)}", file=sys.stderr, flush=True)
    validation, losses = history["validation"], history["train"]["loss"]
    if not losses or not validation["loss"]:
        raise DataError(
            f"{directory / METRICS} holds no complete training and validation record any more; restore it, or train "
            "into another directory."
        )
    final = {name: values[-1] for name, values in validation.items() if name not in (*AXES, "loss")}
    tail = losses[-max(1, len(losses) // 10) :]
    final |= {"validation_loss": validation["loss"][-1], "train_loss": sum(tail) / len(tail)}
    return RunSummary(
        **counted,
        final=final,
        history=history,
        directory=directory,
        checkpoint=CheckpointStore(directory / "checkpoints").path(counted["steps"]),
        environment={**record.environment, **record.compute},
        taints=record.taints,
    )


def load_run(directory: str | Path, step: int | None = None) -> tuple[Recipe, Any, Any]:
    """Recipe, model (in evaluation mode, on the CPU) and data source of a run directory.

    Args:
        directory: what `train` left.
        step: which checkpoint; None takes the newest.

    Raises:
        ConfigError: the directory holds no run. CheckpointError: its checkpoint is missing or damaged.
    """
    directory = Path(directory)
    require_run(directory)
    recipe = load_recipe(directory / RECIPE)
    data = data_of(recipe)
    model = recipe.model.build(data.vocab_size, data.length, recipe.seed)
    snapshot = CheckpointStore(directory / "checkpoints").load(step)
    restore_model(model, snapshot.tensors["model"])
    return recipe, model.eval(), data
