"""Inverse square root: the rate of the original Transformer, with an optional decay at the end.

Vaswani et al. 2017, arXiv 1706.03762, equation 3, scaled to a peak of 1; the decay is that of Zhai et al. 2022,
arXiv 2106.04560. With updates counted s = 1 … n, w of warmup (at least 1 in the root) and D of decay:

    s ≤ w        s/w
    s ≤ n − D    √(w/s)
    else         √(w/s) · (1 − (1 − final) · (s − n + D)/D)

Before its decay the rate does not depend on the end of the run, so that a run can be continued for as long as one likes, and
decayed where a checkpoint is wanted. The stages are `warmup`, `stable` (which falls slowly here) and `decay`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from torchstone.optim.schedules.base import ScheduleConfig, check_step
from torchstone.optim.schedules.three_stages import ThreeStages, fitted


@dataclass(frozen=True)
class InverseSqrt(ThreeStages):
    """`warmup` steps up, then √(warmup / step), times a line to `final` over the last `decay` steps."""

    final: float

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor, or fall on without a decay."""
        check_step(step)
        if self.decay:
            step = min(step, self.steps - 1)
        done = step + 1
        if done <= self.warmup:
            return done / self.warmup
        root = math.sqrt(max(self.warmup, 1) / done)
        decayed = done - self.steps + self.decay
        return root * (1 - (1 - self.final) * decayed / self.decay) if self.decay and decayed > 0 else root


class InverseSqrtConfig(ScheduleConfig):
    """Warmup, then the inverse square root of the step, with a decay at the end if one is asked for."""

    kind: Literal["inverse-sqrt"] = "inverse-sqrt"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")
    decay: float = Field(default=0.0, ge=0, description="fraction of the run if below 1, else steps; 0: none")
    final: float = Field(
        default=0.0, ge=0, le=1, description="what the last step of the decay multiplies the root with"
    )

    def build(self, steps: int, peak: float | None = None) -> InverseSqrt:
        """The schedule of a run of `steps`.

        Raises:
            ConfigError: warmup and decay together are longer than the run.
        """
        warmup, decay = fitted(self.warmup, self.decay, steps)
        return InverseSqrt(steps, warmup, decay, self.final, peak=peak)
