"""What a recipe comes to before it runs: size and cost, decay of every parameter, optimizer updates that a budget buys, and
its data with the shares of each stage."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torchstone.data.shares import Phase, Timetable, first_difference
from torchstone.errors import BudgetError, ConfigError
from torchstone.models.counts import Counts, count
from torchstone.optim.groups import group_table
from torchstone.recipe.part import Part
from torchstone.recipe.schema import Recipe

MOST_STEPS = 10**9


def counts_of(recipe: Recipe) -> Counts:
    """Parameters and FLOPs of a recipe's model on its data's vocabulary and length.

    Training costs three forward passes of the model, or of what the objective makes of it where that is more (pairs of
    prefixes and suffixes): an objective then says so in `flops(model, length)`, per token; and in `planned_flops(model, length)`
    what it costs besides where a step has several micro-batches.

    Raises:
        ConfigError: the objective needs another kind of model.
    """
    vocabulary, length = recipe.data.vocabulary(), recipe.data.sequence_length()
    counts = count(recipe.model, vocabulary, length)
    pieces = recipe.batch.micro is not None and recipe.batch.micro < recipe.batch.sequences
    forward = _forward_flops(recipe.objective, recipe.model, vocabulary, length, pieces)
    return counts if forward is None else replace(counts, training_flops_per_token=3 * forward)


@lru_cache(maxsize=512)
def _forward_flops(objective: Part, model: Part, vocabulary: int, length: int, pieces: bool) -> float | None:
    """What the objective says of its forward pass, per token; None if it says nothing. A plan is a forward pass that has no
    backward one, so that it counts a third."""
    built: Any = objective.build()  # type: ignore[attr-defined]
    if not hasattr(built, "flops"):
        return None
    skeleton = model.skeleton(vocabulary, length)  # type: ignore[attr-defined]
    planned = built.planned_flops(skeleton, length) if pieces and hasattr(built, "planned_flops") else 0.0
    return float(built.flops(skeleton, length) + planned)


def groups_of(recipe: Recipe) -> list[dict[str, Any]]:
    """What the recipe's optimizer decays how strongly (see `group_table`); nothing for an optimizer without `weight_decay`.

    Raises:
        ConfigError: a parameter of the model is in no group or in several.
    """
    decay = getattr(recipe.optimizer, "weight_decay", None)
    if decay is None:
        return []
    model: Any = recipe.model
    return group_table(model.skeleton(recipe.data.vocabulary(), recipe.data.sequence_length()), decay)


def tokens_per_step(recipe: Recipe) -> int:
    """Training tokens of one update over all processes."""
    return recipe.batch.sequences * recipe.data.sequence_length()


def steps_of(recipe: Recipe) -> int:
    """Updates of the whole run: the budget in whole steps, rounded up.

    Raises:
        BudgetError: the budget buys less than one step, or more than 10⁹.
    """
    if recipe.budget.steps is not None:
        exact = float(recipe.budget.steps)
    else:
        exact = _tokens(recipe) / tokens_per_step(recipe)
    given = f"the budget of {getattr(recipe.budget, recipe.budget.unit):,} {recipe.budget.unit.replace('_', ' ')}"
    if exact < 1 - 1e-9:
        raise BudgetError(
            f"{given} buys {exact:.3g} steps of {tokens_per_step(recipe):,} tokens; give at least one step, or lower "
            "batch.sequences."
        )
    if exact > MOST_STEPS:
        raise BudgetError(
            f"{given} buys {exact:.3g} steps, more than {MOST_STEPS:.0e}; lower it, or raise batch.sequences."
        )
    return math.ceil(exact - 1e-9)


def _tokens(recipe: Recipe) -> float:
    budget = recipe.budget
    if budget.tokens is not None:
        return float(budget.tokens)
    counts = counts_of(recipe)
    if budget.flops is not None:
        return budget.flops / counts.training_flops_per_token
    assert budget.tokens_per_parameter is not None
    return budget.tokens_per_parameter * counts.non_embedding


def phases_of(recipe: Recipe) -> tuple[Phase, ...]:
    """Shares of the mixture's sources from step to step, one phase for each stage of the schedule; empty without phases.

    Raises:
        ConfigError: the schedule does not fit the run, or lacks a stage that `data_phases` names; a source is in no stage.
        DataError: a source with a share has no row in the batches of a stage.
    """
    schedule = recipe.schedule.build(steps_of(recipe))
    if not recipe.data_phases:
        return ()
    stages = schedule.stages()
    names = list(dict.fromkeys(stage.name for stage in stages))
    if unknown := [name for name in recipe.data_phases if name not in names]:
        raise ConfigError(
            f"data_phases names the stage {unknown[0]!r}, which this run's schedule ({recipe.schedule.kind}) does not have; its "
            f"stages: {', '.join(names)}."
        )
    own = tuple(recipe.data.shares)
    phases = tuple(Phase(stage.name, stage.begin, tuple(recipe.data_phases.get(stage.name, own))) for stage in stages)
    Timetable(phases, recipe.batch.sequences)
    return phases


def data_of(recipe: Recipe) -> Any:
    """The data source of a recipe with the shares of its phases, built if it is not there; raises what these raise."""
    source, phases = recipe.data.build(None), phases_of(recipe)
    return source.in_phases(phases) if phases else source


def check_phases(before: Recipe, after: Recipe, done: int) -> None:
    """Raise ConfigError if another budget or schedule would have given the steps that are `done` other data."""
    if not (before.data_phases and after.data_phases):
        return
    plans = phases_of(before), phases_of(after)
    advice = "restore budget and schedule, or train into another directory."
    if found := first_difference(*plans, done):
        step, old, new = found
        raise ConfigError(
            f"the run has done {done} steps, and step {step} was in the stage {old.name} with the shares {list(old.shares)}; "
            f"under this budget and schedule it would be in {new.name} with {list(new.shares)}. A change may move only stages "
            f"that are still to come: {advice}"
        )
    stages = [sorted({phase.name for phase in plan}) for plan in plans]
    if done and stages[0] != stages[1]:  # sources are read in blocks whose size depends on all stages
        raise ConfigError(
            f"the run was started with the stages {', '.join(stages[0])}, and this budget and schedule have "
            f"{', '.join(stages[1])}, which changes the rows of every batch: {advice}"
        )
