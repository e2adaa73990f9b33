"""What a recipe comes to before it runs: size and cost, decay of every parameter, optimizer updates that a budget buys."""

from __future__ import annotations

import math
from typing import Any

from torchstone.errors import BudgetError
from torchstone.models.counts import Counts, count
from torchstone.optim.groups import group_table
from torchstone.recipe.schema import Recipe

MOST_STEPS = 10**9


def counts_of(recipe: Recipe) -> Counts:
    """Parameters and FLOPs of a recipe's model on its data's vocabulary and length."""
    vocabulary, length = recipe.data.vocabulary(), recipe.data.sequence_length()
    return count(recipe.model, vocabulary, length)


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
