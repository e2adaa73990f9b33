"""Grow a run: take its newest checkpoint, enlarge the model, and leave a run directory that training continues.

    source/checkpoints/step-S  →  DIR/recipe.yaml    the source's recipe with the larger model
                                      run.json       a record of its own, whose fingerprint fits that recipe
                                      checkpoints/step-S   larger weights, moments extended by zeros, the same position
                                      growth.json    where it comes from, what was appended, loss before and after

The step, the tokens seen and the order of the data go on from S. The recipe's budget is in steps, counted from the source's
first: those that the source had planned, since FLOPs or tokens per parameter would buy another number of steps at the larger
size. The schedule is a function of the step and of that budget, so `torchstone train DIR/recipe.yaml budget.steps=N --out DIR`
goes on where the rate stands at step S of N; `schedule` may be changed as for every resume.

Pitfalls: DIR appears whole or not at all. Its curves begin at S. Its FLOPs axis goes on from what the source has spent, each
token at the price of the model that saw it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchstone.data.batch import Batch
from torchstone.errors import BudgetError, CheckpointError, ConfigError, DataError
from torchstone.models.growth import Fill, Tau, grow
from torchstone.models.growth_report import GrowthReport
from torchstone.models.widen import widen
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Budget, Recipe
from torchstone.storage.atomic import atomic_directory, atomic_write
from torchstone.train.budget import check_phases, counts_of, data_of, phases_of, steps_of
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.distributed import World
from torchstone.train.loop import Position
from torchstone.train.precision import Choice, Compute, default_device
from torchstone.train.record import RECIPE, RunRecord, read_record, start_run
from torchstone.train.resume import training_environment
from torchstone.train.state import optimizer_tensors, restore_model, restore_optimizer

GROWTH = "growth.json"
PROBE = 8  # held-out sequences that loss and logits are compared on


@dataclass(frozen=True)
class AppendTokens:
    """Append parameter tokens; see `torchstone.models.growth.grow`."""

    factor: float | Mapping[str, int] = 2
    keys: Fill = "zero"
    values: Fill = "random"
    tau: Tau = "fixed"
    freeze_old: bool = False
    seed: int = 0

    def apply(self, model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> GrowthReport:
        """Grow the model in place."""
        return grow(model, optimizer=optimizer, batch=batch, **_fields(self))


@dataclass(frozen=True)
class AppendUnits:
    """Append hidden units; see `torchstone.models.widen.widen`."""

    factor: float = 2
    hidden: int | None = None
    seed: int = 0

    def apply(self, model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> GrowthReport:
        """Widen the model in place."""
        return widen(model, optimizer=optimizer, batch=batch, **_fields(self))


Plan = AppendTokens | AppendUnits


def _fields(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def grow_run(
    source: str | Path, directory: str | Path, plan: Plan, *, step: int | None = None, until: int | None = None
) -> GrowthReport:
    """Write a run directory whose model is the source's, enlarged.

    Args:
        source: a run directory with a checkpoint.
        directory: of the new run; must not exist, or be empty.
        plan: what to append.
        step: which checkpoint; None takes the newest.
        until: step at which the grown run ends, those before growth counted; None: where the source was to end.

    Raises:
        ConfigError: the source holds no run, the directory is in use, the plan does not fit the model, or another number of
            steps would have given the source other data. CheckpointError: the checkpoint is missing, damaged, or lacks what
            training needs (τ of Pattention layers is part of it). DataError: the source's data changed. BudgetError:
            `until` leaves nothing to train.
    """
    source, directory = Path(source), Path(directory)
    if not (source / RECIPE).is_file():
        raise ConfigError(f"{source} holds no run (no {RECIPE}); give the directory that `torchstone train` wrote.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is in use; a grown run starts in a directory of its own, choose another --out.")
    recipe, record = load_recipe(source / RECIPE), read_record(source)
    data = data_of(recipe)
    if data.fingerprint != record.data:
        raise DataError(
            f"the data of {source} changed: its fingerprint was {record.data}, now it is {data.fingerprint}. Restore the "
            "files before growing the run."
        )
    snapshot = CheckpointStore(source / "checkpoints").load(step)
    planned = _until(recipe, until, snapshot.step)
    model, optimizer = _restore(recipe, data, snapshot, source)
    report = plan.apply(model, optimizer, next(iter(data.evaluation(PROBE, min(PROBE, recipe.evaluation.sequences)))))
    grown = planned.model_copy(update={"model": model.config})
    if directory.exists():
        directory.rmdir()
    with atomic_directory(directory) as folder:
        position = Position.restored(snapshot.data["position"], counts_of(recipe))
        origin = {"run": record.id, "step": snapshot.step, "training_flops": position.flops}
        _write(folder, grown, record, snapshot.step, position, (model, optimizer))
        atomic_write(folder / GROWTH, json.dumps({"origin": origin, "report": report.data()}, indent=1) + "\n")
    return report


def _until(recipe: Recipe, until: int | None, done: int) -> Recipe:
    """The recipe with a budget in steps: those asked for, or those that its own budget buys at the size that it has."""
    if until is not None and until <= done:
        raise BudgetError(
            f"the grown run is to end at step {until}, and the checkpoint is that of step {done}: nothing would be left to "
            f"train. Steps count from the source's first; give more than {done}."
        )
    planned = recipe.model_copy(update={"budget": Budget(steps=steps_of(recipe) if until is None else until)})
    phases_of(planned)
    check_phases(recipe, planned, done)
    return planned


def _restore(recipe: Recipe, data: Any, snapshot: Snapshot, source: Path) -> tuple[Any, torch.optim.Optimizer]:
    """The source's model and optimizer at the snapshot, on the CPU."""
    if "model" not in snapshot.tensors or not {"optimizer", "position"} <= snapshot.data.keys():
        raise CheckpointError(
            f"step {snapshot.step} of {source} is intact but no training checkpoint (it lacks the model, the optimizer or "
            "the position); grow a run that `torchstone train` wrote."
        )
    model = recipe.model.build(data.vocab_size, data.length, recipe.seed)
    restore_model(model, snapshot.tensors["model"])
    optimizer: torch.optim.Optimizer = recipe.optimizer.build(model)
    restore_optimizer(optimizer, snapshot.tensors.get("optimizer", {}), snapshot.data["optimizer"])
    return model, optimizer


def _write(
    folder: Path,
    recipe: Recipe,
    source: RunRecord,
    step: int,
    position: Position,
    grown: tuple[Any, torch.optim.Optimizer],
) -> None:
    """Recipe, record and checkpoint of the grown run."""
    model, optimizer = grown
    world = World(0, 1, default_device())
    record = start_run(folder, recipe, source.data, world, lambda: Choice(Compute(**source.compute), source.measured))
    tensors, plain = optimizer_tensors(optimizer)
    data = {
        "position": {**asdict(position), "evaluated": -1},  # the larger model has not been evaluated
        "optimizer": plain,
        "fingerprint": record.fingerprint,
        "data": record.data,
        "environment": training_environment(world),
    }
    groups = {"model": dict(model.state_dict()), "optimizer": tensors}
    CheckpointStore(folder / "checkpoints", recipe.checkpoint.keep).save(Snapshot(step, groups, data))
