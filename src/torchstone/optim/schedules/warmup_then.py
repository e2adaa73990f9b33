"""Warmup, then constant, linear or cosine.

Step s (0-based) of S uses factor(s). Warmup rises linearly from 1/w to 1 over w steps; `linear` and `cosine` then fall to
`final` at the last step.

    cosine   final + (1 − final) · ½ (1 + cos πp),   p = (s − w) / (S − 1 − w)

The stages are `warmup`, then `stable` (constant) or `decay` (linear, cosine).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from torchstone.optim.schedules.base import Schedule, ScheduleConfig, Stage, check_step, consecutive, warmup_steps


@dataclass(frozen=True)
class WarmupThen(Schedule):
    """Warmup, then `shape` from 1 to `final`."""

    warmup: int
    final: float
    shape: Literal["constant", "linear", "cosine"]

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
        check_step(step)
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        span = self.steps - 1 - self.warmup
        progress = min(1.0, (step - self.warmup) / span) if span > 0 else 1.0
        weight = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final + (1 - self.final) * weight

    def stages(self) -> tuple[Stage, ...]:
        """`warmup`, and `stable` or `decay`."""
        rest = "stable" if self.shape == "constant" else "decay"
        return consecutive(("warmup", self.warmup), (rest, self.steps - self.warmup))


class ConstantConfig(ScheduleConfig):
    """`schedule: constant`."""

    kind: Literal["constant"] = "constant"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")

    def build(self, steps: int, peak: float | None = None) -> WarmupThen:
        """The schedule of a run of `steps`."""
        return WarmupThen(steps, warmup_steps(self.warmup, steps), 1.0, "constant", peak=peak)


class LinearConfig(ScheduleConfig):
    """`schedule: linear`."""

    kind: Literal["linear"] = "linear"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")
    final: float = Field(default=0.0, ge=0, le=1, description="factor of the peak rate at the last step")

    def build(self, steps: int, peak: float | None = None) -> WarmupThen:
        """The schedule of a run of `steps`."""
        return WarmupThen(steps, warmup_steps(self.warmup, steps), self.final, "linear", peak=peak)


class CosineConfig(ScheduleConfig):
    """`schedule: cosine`."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")
    final: float = Field(default=0.1, ge=0, le=1, description="factor of the peak rate at the last step")

    def build(self, steps: int, peak: float | None = None) -> WarmupThen:
        """The schedule of a run of `steps`."""
        return WarmupThen(steps, warmup_steps(self.warmup, steps), self.final, "cosine", peak=peak)
