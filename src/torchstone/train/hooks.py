"""What an objective may ask of training beside its loss; every method is optional.

    join(world)                           once: the ranks, for objectives that look at the whole global batch (`total`, `gather`)
    reference_run, attach_reference(…)    a run directory whose model the objective needs, and where it is handed over
    count_targets(batch, model)           what a batch adds to the divisor of the step; default: its scored positions
    divisor(count)                        what the step's sum of losses is divided by, from that total over the global batch
    plan(model, batches, autocast)        before the gradient, if this rank has several micro-batches: the same batches with
                                          weights, for what depends on all of them (ranking tokens over the global batch)
    step_metrics(total)                   after the gradient: numbers for the record; `total` sums a tensor over ranks

`plan` costs a forward pass. It runs without gradients and draws its own dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.train.distributed import World


class ObjectiveHooks:
    """The hooks of one objective, with the defaults of those that it lacks.

    Args:
        objective: of the recipe.
        model: that it is a loss of.
        world: this process among its peers.
    """

    def __init__(self, objective: Any, model: Any, world: World) -> None:
        self.objective = objective
        self.model, self.world = model, world
        if hasattr(self.objective, "join"):
            self.objective.join(world)

    def targets(self, batch: Batch) -> int:
        """What a batch adds to the divisor."""
        if hasattr(self.objective, "count_targets"):
            return int(self.objective.count_targets(batch, self.model))
        return int((batch.targets_bt != IGNORE).sum())

    def divisor(self, count: Tensor) -> Tensor:
        """What the sum of the step is divided by, where the global batch has `count` targets."""
        if not hasattr(self.objective, "divisor"):
            return count
        return torch.full_like(count, float(self.objective.divisor(float(count))))

    def planned(self, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager[Any]]) -> Iterable[Batch]:
        """The micro-batches, with weights where the objective plans them.

        Without a plan batches are placed one by one, as they are used; a plan needs all of them at once.
        """
        if not hasattr(self.objective, "plan"):
            return batches
        placed = list(batches)
        if len(placed) == 1:
            return placed
        with torch.no_grad():
            return list(self.objective.plan(self.model, placed, autocast))

    def metrics(self) -> dict[str, float]:
        """Numbers of the objective for the step's record."""
        if not hasattr(self.objective, "step_metrics"):
            return {}
        return dict(self.objective.step_metrics(self.world.total))
