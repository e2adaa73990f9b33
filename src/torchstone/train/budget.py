"""How many optimizer updates a budget buys."""

from __future__ import annotations

import math

from torchstone.errors import BudgetError
from torchstone.models.counts import Counts, count
from torchstone.recipe.schema import Recipe

MOST_STEPS = 10**9


def counts_of(recipe: Recipe) -> Counts:
    """Parameters and FLOPs of a recipe's model on its data's vocabulary and length."""
    return count(recipe.model, recipe.data.vocabulary(), recipe.data.sequence_length())


def tokens_per_step(recipe: Recipe) -> int:
    """Training tokens of one update over all processes."""
    return recipe.batch.sequences * recipe.data.sequence_length()


def steps_of(recipe: Recipe) -> int:
    """Updates of the whole run: the budget in whole steps, rounded up.

    Raises:
        BudgetError: the budget is absurdly large (more than 10⁹ steps).
    """
    budget = recipe.budget
    if budget.steps is not None:
        steps = budget.steps
    else:
        steps = max(1, math.ceil(_tokens(recipe) / tokens_per_step(recipe) - 1e-9))
    if steps > MOST_STEPS:
        raise BudgetError(f"the budget {budget.unit} buys {steps:.3g} steps, more than {MOST_STEPS:.0e}; lower it or raise batch.sequences.")
    return steps


def _tokens(recipe: Recipe) -> float:
    budget = recipe.budget
    if budget.tokens is not None:
        return float(budget.tokens)
    counts = counts_of(recipe)
    if budget.flops is not None:
        return budget.flops / counts.training_flops_per_token
    assert budget.tokens_per_parameter is not None
    return budget.tokens_per_parameter * counts.non_embedding
