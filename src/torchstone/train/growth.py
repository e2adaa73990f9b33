"""Grow a run: take its newest checkpoint, enlarge the model, and leave a run directory that training continues.

    source/checkpoints/step-S  →  DIR/recipe.yaml    the source's recipe with the larger model
                                      run.json       a record of its own, whose fingerprint fits that recipe, with the origin
                                      checkpoints/step-S   larger weights, moments extended by zeros, the same position
                                      growth.json    where it comes from, what was appended, loss before and after

The step, the tokens seen and the order of the data go on from S. The recipe's budget is in steps, counted from the source's
first: those that the source had planned, since FLOPs or tokens per parameter would buy another number of steps at the larger
size. The schedule is a function of the step and of that budget, so `torchstone train DIR/recipe.yaml budget.steps=N --out DIR`
goes on where the rate stands at step S of N. As for a branch (`train.branch`), rates before S are the source's affair: schedule
and budget of the grown run may differ from them, and what it has done itself binds it.

Pitfalls: DIR appears whole or not at all. Its curves begin at S. Its FLOPs axis goes on from what the source has spent, each
token at the price of the model that saw it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchstone.data.batch import Batch
from torchstone.errors import BudgetError, DataError
from torchstone.models.growth import Fill, Tau, grow
from torchstone.models.growth_report import GrowthReport
from torchstone.models.widen import widen
from torchstone.recipe.schema import Budget, Recipe
from torchstone.storage.atomic import atomic_write
from torchstone.train.budget import check_phases, phases_of, steps_of
from torchstone.train.descend import Parent, State, check_free, data_with_reference, open_parent, origin_of, write_child
from torchstone.train.distributed import World
from torchstone.train.names import GROWTH
from torchstone.train.precision import default_device
from torchstone.train.resume import training_environment
from torchstone.train.state import optimizer_tensors, restore_model, restore_optimizer

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
    check_free(directory, "a grown run")
    parent = open_parent(source, step)
    data, reference, fingerprint = data_with_reference(parent.recipe, parent.record.reference)
    if fingerprint != parent.record.data:
        raise DataError(
            f"the data of {source} changed: its fingerprint was {parent.record.data}, now it is {fingerprint}. Restore "
            "the files before growing the run."
        )
    planned = _until(parent.recipe, until, parent.step)
    model, optimizer = _restore(parent, data)
    probe = min(PROBE, parent.recipe.evaluation.sequences)
    report = plan.apply(model, optimizer, next(iter(data.evaluation(PROBE, probe))))
    grown = planned.model_copy(update={"model": model.config})
    origin = origin_of(parent, directory, "growth", None, [f"{report.unit} appended"], ())
    tensors, plain = optimizer_tensors(optimizer)
    position = replace(parent.position, evaluated=-1)  # the larger model has not been evaluated
    environment = training_environment(World(0, 1, default_device()))
    state = State({"model": dict(model.state_dict()), "optimizer": tensors}, plain, position)

    def describe(folder: Path) -> None:
        lineage = {"run": parent.record.id, "step": parent.step, "training_flops": parent.position.flops}
        content = json.dumps({"origin": lineage, "report": report.data()}, indent=1)
        atomic_write(folder / GROWTH, content + "\n")

    write_child(directory, grown, fingerprint, parent, origin, state, environment, reference, describe)
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


def _restore(parent: Parent, data: Any) -> tuple[Any, torch.optim.Optimizer]:
    """The parent's model and optimizer at its checkpoint, on the CPU."""
    recipe, snapshot = parent.recipe, parent.snapshot
    model = recipe.model.build(data.vocab_size, data.length, recipe.seed)
    restore_model(model, snapshot.tensors["model"])
    optimizer: torch.optim.Optimizer = recipe.optimizer.build(model)
    restore_optimizer(optimizer, snapshot.tensors.get("optimizer", {}), snapshot.data["optimizer"])
    return model, optimizer
