"""Trapezoid: a line up, the peak, and a line down that would reach the floor one step after the last.

Known from Xing et al. 2018 (arXiv 1802.08770) and used with many names, among them "constant with cooldown" (Hägele et al. 2024,
arXiv 2405.18392). For step s = 0 … n−1, w of warmup and D of decay:

    s < w        (s + 1)/w
    s < n − D    1
    else         final + (1 − final) · (n − s)/D

so that no step has the rate 0, neither the first nor the last. `wsd` with shape `linear` is the same but for one step: there the
last step has exactly `final`. The stages are `warmup`, `stable` and `decay`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from torchstone.optim.schedules.base import ScheduleConfig, check_step
from torchstone.optim.schedules.three_stages import ThreeStages, fitted


@dataclass(frozen=True)
class Trapezoid(ThreeStages):
    """`warmup` steps up to 1, then 1, then `decay` steps towards `final`."""

    final: float

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
        check_step(step)
        step = min(step, self.steps - 1)
        if step < self.warmup:
            return (step + 1) / self.warmup
        left = self.steps - step
        return 1.0 if left >= self.decay else self.final + (1 - self.final) * left / self.decay


class TrapezoidConfig(ScheduleConfig):
    """Straight lines: up, level, down."""

    kind: Literal["trapezoid"] = "trapezoid"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")
    decay: float = Field(default=0.2, ge=0, description="fraction of the run if below 1, else steps")
    final: float = Field(default=0.0, ge=0, le=1, description="factor of the peak rate one step after the last")

    def build(self, steps: int, peak: float | None = None) -> Trapezoid:
        """The schedule of a run of `steps`.

        Raises:
            ConfigError: warmup and decay together are longer than the run.
        """
        warmup, decay = fitted(self.warmup, self.decay, steps)
        return Trapezoid(steps, warmup, decay, self.final, peak=peak)
