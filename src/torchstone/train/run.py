"""Train a recipe into a run directory, resume it, and load what it left.

    RUN/recipe.yaml       the recipe as resolved
        run.json          fingerprints, environment, precision and compilation as chosen; changes at each resume
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import CheckpointError, ConfigError, DataError, InterruptedRun
from torchstone.recipe.fingerprint import fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.storage.atomic import atomic_write
from torchstone.storage.names import safe_text
from torchstone.train.budget import counts_of, steps_of
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.distributed import World, world
from torchstone.train.events import AXES, make_sinks, read_history
from torchstone.train.loop import Callback, Loop, Position, Trainer
from torchstone.train.precision import Compute, choose_compute
from torchstone.train.progress import Reporter, TrainingProgress
from torchstone.train.resume import Changes, check_changes, training_environment
from torchstone.train.signals import Stop, stop_on_signals
from torchstone.train.state import optimizer_tensors, restore_model, restore_optimizer

OPTIMIZER_COPIES = 3  # weights and two moments, in fp32


@dataclass(frozen=True)
class RunSummary:
    """A finished run.

    Attributes:
        steps, tokens, flops, seconds, parameters, peak_bytes: what it was and what it cost.
        final: metrics at the end: `train_loss` (mean of the last tenth of the steps), `validation_loss`, `accuracy`, ….
        history: `train` and `validation` curves against steps, tokens, flops and seconds.
        directory: the run directory.
        checkpoint: folder of the last checkpoint.
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
        callbacks: extra measurements at evaluations.
        progress: receives every step; None shows a bar on a terminal and lines elsewhere.
        compute: precision and compilation; None takes the recipe's (measured where it says `auto`).
        device: None takes the first GPU, else the CPU.
        stop: ask it to stop from another thread; signals set it too.

    Raises:
        InterruptedRun: a stop was asked for; the checkpoint is complete and the same call continues.
        NonFiniteError, ConfigError, DataError, CheckpointError, BudgetError: see their classes.
    """
    recipe = load_recipe(recipe)
    directory = Path(directory)
    with world(device) as peers, stop_on_signals(stop or Stop()) as asked:
        done = _finished(recipe, directory)
        if done is not None and resume:
            return done
        run = _Run(recipe, directory, peers, asked)
        return run.train(resume, fallback, allow, callbacks, progress, compute)


class _Run:
    """One call of `train`."""

    def __init__(self, recipe: Recipe, directory: Path, peers: World, stop: Stop) -> None:
        self.recipe, self.directory, self.world, self.stop = recipe, directory, peers, stop
        self.store = CheckpointStore(directory / "checkpoints", recipe.checkpoint.keep)
        self.record: dict[str, Any] = {}

    def train(
        self,
        resume: bool,
        fallback: bool,
        allow: Sequence[str],
        callbacks: Sequence[Callback],
        progress: Reporter | None,
        compute: Compute | None,
    ) -> RunSummary:
        """Open, restore, loop, summarise."""
        steps, counts = steps_of(self.recipe), counts_of(self.recipe)
        data = self._build_data()
        self.directory.mkdir(parents=True, exist_ok=True)
        changes = self._open(data.fingerprint, resume, allow, compute)
        chosen = Compute(**self.record["compute"])
        model = self.recipe.model.build(data.vocab_size, data.length, self.recipe.seed).to(self.world.device)
        trainer = Trainer(self.recipe, model, data, chosen, self.world, steps, counts)
        shown = TrainingProgress(self.directory.name) if progress is None and self.world.leads else None
        self._restore(trainer, fallback, say=_to_stderr)
        for line in changes.lines():
            _to_stderr(f"note: {line}")
        taints = [taint for resumed in self.record["resumes"] for taint in resumed["taints"]]
        trainer.position.taints = list(dict.fromkeys(trainer.position.taints + taints))
        if self.world.leads:
            self.store.check_space(counts.parameters * 4 * OPTIMIZER_COPIES)
        sinks = (
            make_sinks(self.recipe.sinks, self.directory, self.recipe.data_dict()) if self.world.leads else []
        )
        report: Reporter = progress or shown or (lambda state: None)
        loop = Loop(trainer, self.directory, sinks, callbacks, report, lambda: self._save(trainer), self.stop)
        try:
            loop.run()
        finally:
            if shown is not None:
                shown.close()
            for sink in sinks:
                sink.close()
        if trainer.position.step < steps:
            raise InterruptedRun(
                f"stopped by {self.stop.reason or 'another rank'} after step {trainer.position.step} of {steps}; the checkpoint is complete. The same "
                "command continues."
            )
        return self._summarise(trainer)

    def _build_data(self) -> Any:
        """The data source; the leading rank builds shards, the others open them."""
        if not self.world.leads:
            self.world.barrier()
        source = self.recipe.data.build(None)
        if self.world.leads:
            self.world.barrier()
        return source

    def _open(self, data: str, resume: bool, allow: Sequence[str], compute: Compute | None) -> Changes:
        """Start the run's record, or check that this call may continue it."""
        path = self.directory / "run.json"
        environment = training_environment(self.world)
        fresh = not path.exists()
        self.world.barrier()  # every rank has looked before the leading one writes
        if fresh:
            if self.world.leads:
                chosen = compute or choose_compute(self.recipe, self.world.device)
                self.record = {
                    "fingerprint": fingerprint(self.recipe, data=data),
                    "data": data,
                    "environment": environment,
                    "compute": chosen.data(),
                    "resumes": [],
                }
                atomic_write(self.directory / "recipe.yaml", dump_yaml(self.recipe))
                atomic_write(path, json.dumps(self.record, indent=1) + "\n")
            self.world.barrier()
            self.record = json.loads(path.read_text())
            return Changes()
        if not resume:
            raise ConfigError(
                f"{self.directory} holds a run already; resume it, or choose another directory."
            )
        self.record = _read_record(path)
        before = load_recipe(self.directory / "recipe.yaml")
        changes = check_changes(
            before, self.recipe, (self.record["data"], data), (self.record["environment"], environment), allow
        )
        self.world.barrier()
        self.record["resumes"].append(asdict(changes))
        if self.world.leads:
            atomic_write(self.directory / "recipe.yaml", dump_yaml(self.recipe))
            atomic_write(path, json.dumps({**self.record, "data": data}, indent=1) + "\n")
        return changes

    def _restore(self, trainer: Trainer, fallback: bool, say: Any) -> None:
        if not self.store.steps():
            return
        snapshot = self.store.load(fallback=fallback, say=say)
        restore_model(trainer.model, snapshot.tensors["model"])
        settings = [{**group} for group in trainer.optimizer.param_groups]
        restore_optimizer(
            trainer.optimizer, snapshot.tensors.get("optimizer", {}), snapshot.data["optimizer"]
        )
        for group, asked in zip(trainer.optimizer.param_groups, settings, strict=True):
            group.update(
                {name: asked[name] for name in trainer.optimizer.defaults}
            )  # they may have been changed
        trainer.position = Position(**snapshot.data["position"])

    def _save(self, trainer: Trainer) -> None:
        """Save the run; the leading rank writes, the others wait."""
        if self.world.leads:
            tensors, plain = optimizer_tensors(trainer.optimizer)
            groups = {"model": dict(trainer.model.state_dict()), "optimizer": tensors}
            data = {
                "position": asdict(trainer.position),
                "optimizer": plain,
                "fingerprint": self.record["fingerprint"],
                "data": self.record["data"],
                "environment": training_environment(self.world),
            }
            self.store.save(Snapshot(trainer.position.step, groups, data))
        self.world.barrier()

    def _summarise(self, trainer: Trainer) -> RunSummary:
        position, flops = trainer.position, trainer.position.tokens * trainer.counts.training_flops_per_token
        data = {
            "steps": position.step,
            "tokens": position.tokens,
            "flops": flops,
            "seconds": position.seconds,
            "parameters": trainer.counts.parameters,
            "peak_bytes": position.peak_bytes,
            "taints": position.taints,
        }
        if self.world.leads:
            atomic_write(self.directory / "summary.json", json.dumps(data, indent=1) + "\n")
        self.world.barrier()
        return _summary(self.directory, data)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        record["data"], record["environment"], record["compute"], record["resumes"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); restore it or train into another directory."
        ) from error
    return record


def _finished(recipe: Recipe, directory: Path) -> RunSummary | None:
    """The summary of a run that is finished under this very recipe."""
    path = directory / "summary.json"
    if not path.exists() or load_recipe(directory / "recipe.yaml") != recipe:
        return None
    data = json.loads(path.read_text())
    return _summary(directory, data) if data["steps"] >= steps_of(recipe) else None


def _summary(directory: Path, data: Mapping[str, Any]) -> RunSummary:
    history, warnings = read_history(directory)
    for warning in warnings:
        _to_stderr(f"warning: {warning}")
    validation, losses = history["validation"], history["train"]["loss"]
    if not losses or not validation["loss"]:
        raise DataError(
            f"{directory / 'metrics.jsonl'} holds no complete training and validation record any more; delete "
            f"{directory / 'summary.json'} and run the same command to evaluate again, or restore the file."
        )
    final = {name: values[-1] for name, values in validation.items() if name not in (*AXES, "loss")}
    tail = losses[-max(1, len(losses) // 10) :]
    final |= {"validation_loss": validation["loss"][-1], "train_loss": sum(tail) / len(tail)}
    checkpoint = CheckpointStore(directory / "checkpoints").path(data["steps"])
    known = {**data, "taints": tuple(data["taints"]), "directory": directory, "checkpoint": checkpoint}
    return RunSummary(**known, final=final, history=history)


def load_run(directory: str | Path, step: int | None = None) -> tuple[Recipe, Any, Any]:
    """Recipe, model (in evaluation mode, on the CPU) and data source of a run directory.

    Args:
        directory: what `train` left.
        step: which checkpoint; None takes the newest.

    Raises:
        ConfigError: the directory holds no run. CheckpointError: its checkpoint is missing or damaged.
    """
    directory = Path(directory)
    if not (directory / "recipe.yaml").is_file():
        raise ConfigError(
            f"{directory} holds no run (no recipe.yaml); give the directory that `torchstone train` wrote."
        )
    recipe = load_recipe(directory / "recipe.yaml")
    data = recipe.data.build(None)
    model = recipe.model.build(data.vocab_size, data.length, recipe.seed)
    snapshot = CheckpointStore(directory / "checkpoints").load(step)
    restore_model(model, snapshot.tensors["model"])
    return recipe, model.eval(), data


def _to_stderr(text: str) -> None:
    print(safe_text(text), file=sys.stderr, flush=True)
