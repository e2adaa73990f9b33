"""Schedules of three stages: warmup, stable, decay, each of a number of steps."""

from __future__ import annotations

from dataclasses import dataclass

from torchstone.optim.schedules.base import Schedule, Stage, check_fit, consecutive, step_count


@dataclass(frozen=True)
class ThreeStages(Schedule):
    """`warmup` steps, `decay` steps at the end, and what is left between them."""

    warmup: int
    decay: int

    def stages(self) -> tuple[Stage, ...]:
        """`warmup`, `stable` and `decay`."""
        stable = self.steps - self.warmup - self.decay
        return consecutive(("warmup", self.warmup), ("stable", stable), ("decay", self.decay))


def fitted(warmup: float, decay: float, steps: int) -> tuple[int, int]:
    """Steps of warmup and decay in a run of `steps`; raises ConfigError if together they are longer than it."""
    counts = step_count(warmup, steps, "warmup"), step_count(decay, steps, "decay")
    check_fit(*counts, steps)
    return counts
