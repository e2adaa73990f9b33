"""A recipe drawn together to a short run: the budget, and with it every number of steps that its schedule gives.

Fractions of a run shrink by themselves; a warmup of 2000 steps in a run of 50,000 becomes 4 in one of 100, and the ends of
WSD-S's cycles move in proportion. A stage keeps at least 2 steps, for 1 means a whole cycle to some schedules.
"""

from __future__ import annotations

from typing import Any

from torchstone.errors import ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import steps_of

SHARE_OF_RUN, LEAST_STEPS = 0.1, 100
STAGES = ("warmup", "rewarmup", "decay")
PLAIN = ["evaluation.every=null", "sinks=[]", "checkpoint.every=null"]


def shortened(recipe: Recipe, steps: int | None = None) -> Recipe:
    """The recipe as a run of `steps`, evaluated at its end; None: a tenth of its steps, at least 100, at most all of them.

    Raises:
        ConfigError: the optimizer has no learning rate, or the schedule does not fit into so few steps.
    """
    if getattr(recipe.optimizer, "learning_rate", None) is None:
        raise ConfigError(f"optimizer {recipe.optimizer.kind!r} has no learning_rate to search for.")
    whole = steps_of(recipe)
    count = steps or min(whole, max(LEAST_STEPS, round(SHARE_OF_RUN * whole)))
    data = recipe.data_dict()
    data |= {"budget": {"steps": count}, "schedule": _drawn_together(data["schedule"], min(1.0, count / whole))}
    try:
        short = load_recipe(data, PLAIN)
        short.schedule.build(count)
    except ConfigError as error:
        raise ConfigError(
            f"this recipe's schedule does not fit into a short run of {count} steps ({str(error).rstrip('.')}); give more steps "
            "(--steps N), or a plain schedule for the search, for example schedule=constant."
        ) from error
    return short


def _drawn_together(schedule: dict[str, Any], share: float) -> dict[str, Any]:
    """The schedule with its numbers of steps multiplied by `share`."""
    found = dict(schedule)
    for name in STAGES:
        if isinstance(found.get(name), int | float) and found[name] > 1:
            found[name] = max(2, round(found[name] * share))
    for name in ("cycles", "cycle_length"):
        if isinstance(found.get(name), list):
            found[name] = [max(2, round(steps * share)) for steps in found[name]]
    if isinstance(found.get("cycle_length"), int | float) and found["cycle_length"] > 1:
        found["cycle_length"] = max(2, round(found["cycle_length"] * share))
    return found
