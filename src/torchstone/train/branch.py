"""Branch a run: a run directory of its own that goes on from a checkpoint of another run, under another plan.

    torchstone train --branch runs/plateau@800 --decay 200 --out runs/decay-800

    runs/plateau  ──────●───────────────►  steps 801 … at the peak rate
                        └── runs/decay-800: steps 801 … 1000, rate to 0

Weights, optimizer moments, step, tokens, FLOPs and the order of the data go on from the checkpoint; nothing restarts. What
only decides what comes (schedule, budget, evaluation, checkpoint, sinks) may differ from the parent, and settings of the
optimizer or the data where `allow` names them. Under the parent's own recipe a branch is bit for bit what the parent would
have done. Two uses:

  decay branch            from a plateau, to see what the run is worth now (Wen et al. 2024, arXiv 2410.05192); the plateau
                          goes on elsewhere
  continuation (WSD-S)    from a checkpoint whose rate has decayed, with the rate put back to its peak; the moments stay

The schedule is a function of the step, counted from the root run's first: a branch at step 800 whose budget is 1000 steps
trains 200. `decay=200` (`--decay 200`) says the same in one word.

Pitfalls: a schedule whose warmup or decay is a fraction of the run has other borders under another budget; give them in steps.
With `data_phases` the branch's schedule must have the same stages, and give the steps before the branching point the data
that they had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import BudgetError, ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import check_phases, groups_of, phases_of, steps_of
from torchstone.train.checkpoint import say_on_stderr
from torchstone.train.descend import (
    Parent,
    State,
    check_free,
    data_with_reference,
    find_checkpoint,
    is_place_of,
    open_parent,
    origin_of,
    write_child,
)
from torchstone.train.distributed import World, world
from torchstone.train.evaluate import evaluate
from torchstone.train.events import read_history
from torchstone.train.names import RECIPE, RECORD
from torchstone.train.precision import Compute
from torchstone.train.record import Origin, check_groups, read_record
from torchstone.train.reference import Reference
from torchstone.train.resume import BRANCHED, Changes, check_changes, training_environment
from torchstone.train.state import restore_model

AT_PEAK = 1 - 1e-9


def branch_run(
    checkpoint: str | Path,
    directory: str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    *,
    decay: int | None = None,
    allow: Sequence[str] = (),
    resume: bool = True,
    device: torch.device | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> Recipe:
    """Make the run directory of a branch, unless it is there already, and return the recipe to train in it.

    `train(branch_run(checkpoint, directory, …), directory)` starts the branch, and continues it after an interruption.

    Args:
        checkpoint: a run directory (its newest checkpoint), `RUN@STEP`, or `RUN/checkpoints/step-00000100`.
        directory: of the branch; not in use, or holding this very branch.
        recipe: of the branch; None takes the parent's (or the branch's own, where it is there already).
        overrides: `key=value` texts, applied to the recipe.
        decay: end after this many steps, in which the rate falls linearly to 0; overrides may change the shape
            (`schedule.shape`, `schedule.final`).
        allow: sections that may differ from the parent beside what only decides what comes: `optimizer`, `data` (a taint).
        resume: False refuses a directory that holds a run.
        device: where the loss at the branching point is measured, if the parent has not; None takes the first GPU, else the CPU.
        say: receives a line about the branching point.

    Raises:
        ConfigError: there is no such run, the directory is in use, the recipe differs in more than may differ, or `decay`
            begins where the rate is not at its peak. BudgetError: nothing is left to train. DataError: the data changed.
            CheckpointError: the parent is damaged. Nothing has been written then.
    """
    directory = Path(directory)
    with world(device) as peers:
        there = (directory / RECORD).is_file()
        peers.barrier()  # every rank has looked before the leading one writes
        if there and not resume:
            raise ConfigError(f"{directory} holds a run already; resume it, or choose another directory.")
        if not there and peers.leads:
            _start(open_parent(*find_checkpoint(checkpoint)), directory, recipe, overrides, decay, allow, peers, say)
        peers.barrier()
    origin = _check_origin(directory, checkpoint)
    return _asked(load_recipe(directory / RECIPE), recipe, overrides, decay, origin.step)


def _start(
    parent: Parent,
    directory: Path,
    recipe: Recipe | str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    decay: int | None,
    allow: Sequence[str],
    peers: World,
    say: Callable[[str], None],
) -> None:
    """Check everything, then write the branch's directory."""
    check_free(directory, "a branch")
    if decay is not None:
        _check_plateau(parent)
    asked = _asked(parent.recipe, recipe, overrides, decay, parent.step)
    _check_end(parent, asked)
    data, reference, fingerprint = data_with_reference(asked, parent.record.reference)
    changes = _check(parent, asked, fingerprint, allow, peers)
    loss = _loss(parent, asked, (data, reference, fingerprint), World(0, 1, peers.device))
    differs = (*changes.recipe, *changes.environment)
    origin = origin_of(parent, directory, "branch", loss, differs, changes.taints)
    state = State(
        parent.snapshot.tensors, parent.snapshot.data["optimizer"], replace(parent.position, evaluated=parent.step)
    )
    write_child(directory, asked, fingerprint, parent, origin, state, training_environment(peers), reference)
    say(f"branch of {parent.directory} at step {parent.step:,}, validation loss {loss:.4f}")
    for line in changes.lines(f"from {parent.directory.name}"):
        say(f"note: {line}")


def _asked(base: Recipe, recipe: Any, overrides: Sequence[str], decay: int | None, step: int) -> Recipe:
    """The recipe of the branch: the given one or `base`, with the decay, with the overrides."""
    asked = base if recipe is None else load_recipe(recipe)
    if decay is not None:
        if decay < 1:
            raise BudgetError(f"a decay of {decay} steps is none; give at least 1.")
        stages = asked.schedule.build(steps_of(asked)).stages()
        warmup = stages[0].end if stages and stages[0].name == "warmup" else 0
        plan = f"{{kind: wsd, warmup: {warmup}, decay: {decay}, shape: linear, final: 0}}"
        asked = load_recipe(asked, [f"budget.steps={step + decay}", f"schedule={plan}"])
    return load_recipe(asked, overrides)


def _check_plateau(parent: Parent) -> None:
    """Raise ConfigError unless the parent's last update was at the peak rate, where a decay begins.

    The rate of that update is what the optimizer's state says, since the schedule may have been another one then.
    """
    peak = getattr(parent.recipe.optimizer, "learning_rate", None)
    if peak is None:
        factor = parent.recipe.schedule.build(steps_of(parent.recipe)).factor(max(0, parent.step - 1))
    else:
        factor = parent.snapshot.data["optimizer"]["param_groups"][0]["lr"] / peak
    if parent.step == 0 or factor < AT_PEAK:
        raise ConfigError(
            f"the rate of {parent.directory} at step {parent.step} is {factor:.4g} of its peak, and --decay begins at the "
            "peak: it would jump up first. Branch from a checkpoint on the plateau (RUN@STEP), or give schedule and "
            "budget.steps yourself."
        )


def _check_end(parent: Parent, asked: Recipe) -> None:
    """Raise BudgetError if nothing is left to train."""
    steps = steps_of(asked)
    if steps <= parent.step:
        raise BudgetError(
            f"the branch begins at step {parent.step}, and its budget ends at step {steps}: nothing would be left to train. "
            "Steps count from the first of the run that it branches from; give budget.steps=N with N above "
            f"{parent.step}, or --decay STEPS."
        )


def _check(parent: Parent, asked: Recipe, data: str, allow: Sequence[str], peers: World) -> Changes:
    """What differs from the parent; raises typed errors for what may not differ."""
    phases_of(asked)
    changes = check_changes(
        parent.recipe,
        asked,
        (parent.record.data, data),
        (parent.record.environment, training_environment(peers)),
        allow,
        told=BRANCHED,
    )
    check_phases(parent.recipe, asked, parent.step)
    check_groups(parent.record.groups or groups_of(parent.recipe), groups_of(asked), BRANCHED)
    return changes


def _loss(parent: Parent, asked: Recipe, source: tuple[Any, Reference | None, str], alone: World) -> float:
    """Validation loss at the branching point: on record if the parent measured the same there, else measured now."""
    data, reference, fingerprint = source
    measured = read_history(parent.directory)[0]["validation"]
    same = asked.evaluation.sequences == parent.recipe.evaluation.sequences and fingerprint == parent.record.data
    if same and parent.step in measured["steps"]:
        return float(measured["loss"][measured["steps"].index(parent.step)])
    model = asked.model.build(data.vocab_size, data.length, asked.seed)
    restore_model(model, parent.snapshot.tensors["model"])
    objective = asked.objective.build()
    if reference is not None:
        objective.attach_reference(reference.model.to(alone.device))
    rows, compute = asked.batch.micro or asked.batch.sequences, Compute(**parent.record.compute)
    found = evaluate(model.to(alone.device), objective, data, asked.evaluation.sequences, rows, compute, alone)
    assert found is not None  # nothing stops it
    return found["loss"]


def _check_origin(directory: Path, checkpoint: str | Path) -> Origin:
    """The origin of what the directory holds; raises ConfigError unless it is a branch from that checkpoint.

    A parent that is gone is known by its place.
    """
    origin = read_record(directory).origin
    if origin is None:
        raise ConfigError(f"{directory} holds a run that is no branch; choose another --out for the branch.")
    place = directory / origin.directory
    if origin.kind == "branch" and not (place / RECIPE).is_file() and is_place_of(checkpoint, place, origin.step):
        return origin
    source, step = find_checkpoint(checkpoint)
    if (origin.kind, origin.run) != ("branch", read_record(source).id) or step not in (None, origin.step):
        named = f"step {origin.step} of {origin.directory or origin.run}"
        raise ConfigError(
            f"{directory} holds a {origin.kind} from {named}, and --branch says {checkpoint}; choose another --out. To go on "
            f"with what is there: torchstone train {directory / RECIPE} --out {directory}."
        )
    return origin
