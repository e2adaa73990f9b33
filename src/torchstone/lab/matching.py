"""Make an arm as large, or as expensive, as its baseline.

Given a baseline recipe and an arm's recipe, one named free dimension of the arm is solved for so that parameters or
training FLOPs agree within a tolerance. Counts come from the model built without memory (`torchstone.models.counts`),
so a match costs milliseconds and is exact, not a formula.

Free dimensions
  feedforward  size of the feed-forward (hidden width, or tokens of token-parameter attention); multiples of 8 are preferred
               when one lies within the tolerance
  depth        number of blocks
  width        model width, in steps that keep the arm's heads whole
  steps        training length; only for FLOPs, where it trades model size against tokens

Pitfall: matching parameters does not match FLOPs, and the reverse. The record of a match names what was matched and
the residual; a residual above the tolerance is an error, never a silent near miss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torchstone.errors import BudgetError, ConfigError
from torchstone.recipe.schema import Budget, Recipe
from torchstone.report.result import Match
from torchstone.train.budget import counts_of, steps_of

On = Literal["params", "flops"]
Free = Literal["feedforward", "depth", "width", "steps"]
FREE: tuple[str, ...] = ("feedforward", "depth", "width", "steps")
TOLERANCE = 0.005


def training_flops(recipe: Recipe) -> float:
    """Training FLOPs (forward and backward) over the whole budget."""
    tokens = steps_of(recipe) * recipe.batch.sequences * recipe.data.sequence_length()
    return counts_of(recipe).training_flops_per_token * tokens


def quantity(recipe: Recipe, on: On) -> float:
    """The number that `on` names: parameters, or training FLOPs over the budget."""
    return float(counts_of(recipe).parameters) if on == "params" else training_flops(recipe)


def match(
    baseline: Recipe, arm: Recipe, on: On, free: Free = "feedforward", tolerance: float = TOLERANCE
) -> tuple[Recipe, Match]:
    """The arm's recipe with `free` changed so that it agrees with the baseline, and the record of it.

    Args:
        baseline, arm: complete recipes.
        on: `params` (all parameters) or `flops` (training FLOPs over the budget).
        free: the dimension of the arm that may change.
        tolerance: largest |achieved/target - 1|.

    Raises:
        ConfigError: unknown dimension, or one that cannot change `on`.
        BudgetError: no value of the dimension comes within the tolerance; the message holds the nearest.
    """
    if on not in ("params", "flops") or free not in FREE:
        raise ConfigError(f"cannot match {on!r} with {free!r}; match params or flops, free one of {', '.join(FREE)}.")
    if free == "steps" and on == "params":
        raise ConfigError(
            "training steps cannot change the number of parameters; match flops, or free another dimension."
        )
    target = quantity(baseline, on)
    if abs(quantity(arm, on) / target - 1) <= tolerance:
        return arm, _record(on, "none needed", None, None, target, quantity(arm, on), tolerance)
    axis = _AXES[free](arm)
    value = _nearest(axis, on, target, tolerance)
    matched = axis.put(value)
    achieved = quantity(matched, on)
    if abs(achieved / target - 1) > tolerance:
        raise BudgetError(
            f"cannot match {on} by {axis.path}: the nearest value {value} gives {achieved:.6g} against {target:.6g} "
            f"({achieved / target - 1:+.2%}, allowed ±{tolerance:.2%}). Free another dimension "
            f"({', '.join(name for name in FREE if name != free)}), widen the tolerance, or compare unmatched."
        )
    return matched, _record(on, axis.path, axis.now, value, target, achieved, tolerance)


def _record(on: On, free: str, before: Any, after: Any, target: float, achieved: float, tolerance: float) -> Match:
    return Match(
        on=on,
        free=free,
        before=before,
        after=after,
        target=target,
        achieved=achieved,
        residual=achieved / target - 1,
        tolerance=tolerance,
    )


class _Axis:
    """A free dimension: its path, its value now, the grid of allowed values, and how to put one in."""

    def __init__(self, path: str, now: int, step: int, put: Callable[[int], Recipe]) -> None:
        self.path, self.now, self.step, self.put = path, now, step, put


def _model(recipe: Recipe, **change: Any) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=change)})


def _feedforward(recipe: Recipe) -> _Axis:
    block = recipe.model.block
    part = block.feedforward
    field = part.size_field

    def put(size: int) -> Recipe:
        changed = block.model_copy(update={"feedforward": part.model_copy(update={field: size})})
        return _model(recipe, block=changed)

    return _Axis(f"model.block.feedforward.{field}", part.width_of(recipe.model.width), 1, put)


def _depth(recipe: Recipe) -> _Axis:
    return _Axis("model.depth", recipe.model.depth, 1, lambda depth: _model(recipe, depth=depth))


def _width(recipe: Recipe) -> _Axis:
    step = 2 * recipe.model.head_dim
    return _Axis("model.width", recipe.model.width, step, lambda width: _model(recipe, width=width))


def _steps(recipe: Recipe) -> _Axis:
    def put(steps: int) -> Recipe:
        return recipe.model_copy(update={"budget": Budget(steps=steps)})

    return _Axis("budget.steps", steps_of(recipe), 1, put)


_AXES: dict[str, Callable[[Recipe], _Axis]] = {
    "feedforward": _feedforward,
    "depth": _depth,
    "width": _width,
    "steps": _steps,
}


def _nearest(axis: _Axis, on: On, target: float, tolerance: float) -> int:
    """The value on the axis whose quantity is nearest to the target (the quantity grows along every axis)."""
    low, high = axis.step, axis.step

    def measure(value: int) -> float:
        return quantity(axis.put(value), on)

    while measure(high) < target:
        low, high = high, high * 2
        if high > 2**26:
            raise BudgetError(f"{axis.path} cannot bring {on} up to {target:.6g}; free another dimension.")
    while high - low > axis.step:
        middle = low + (high - low) // (2 * axis.step) * axis.step
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    best = min((low, high), key=lambda value: abs(measure(value) / target - 1))
    if axis.path.startswith("model.block.feedforward."):
        return min(
            _round_values(best),
            key=lambda value: (
                abs(measure(value) / target - 1) > tolerance,
                value % 8 != 0,
                abs(value - best),
            ),
        )
    return best


def _round_values(value: int) -> Iterable[int]:
    """The value itself and the multiples of 8 around it (which matrix kernels like)."""
    return {value, max(8, math.floor(value / 8) * 8), math.ceil(value / 8) * 8}
