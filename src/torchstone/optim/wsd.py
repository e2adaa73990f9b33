"""Warmup, stable, decay (WSD): the peak rate for most of the run, then a short fall to `final`.

JetMoE (Shen, Guo, Cai, Qin 2024, arXiv 2404.07413) follows MiniCPM (Hu et al. 2024, arXiv 2404.06395): the length of a run
need not be known before its decay begins, and the best data comes in the decay (`data_phases` of a recipe). With updates
counted s = 1 … n, w of warmup and D of decay, S = n − D and p = (s − S) / D:

    s ≤ w    initial + (1 − initial) · s/w
    s ≤ S    1
    else     exponential   final^p                                     JetMoE's 0.1^((s−S)/D), with final = 0.1
             linear        1 − (1 − final) · p
             cosine        final + (1 − final) · ½ (1 + cos πp)
             sqrt          1 − (1 − final) · √p                         "1 − sqrt"

so that the first update of the decay is below the peak already and the last one has exactly `final`.

The stages are `warmup`, `stable` and `decay`. JetMoE-8B: peak 5e-4, warmup from `initial` 0.1 over 10B of 1250B tokens,
decay over the last 250B.

Pitfalls
  fractions   of the whole run, not of what warmup leaves; `1` is one step, not all of them.
  budget      `decay` as a fraction moves its beginning when a larger budget continues a run; updates that were made in the old
              decay stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from torchstone.errors import ConfigError
from torchstone.optim.schedules import Stage, consecutive, step_count
from torchstone.recipe.part import Part

Shape = Literal["exponential", "linear", "cosine", "sqrt"]

_FACTORS: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda p, final: final**p,
    "linear": lambda p, final: 1 - (1 - final) * p,
    "cosine": lambda p, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * p)),
    "sqrt": lambda p, final: 1 - (1 - final) * math.sqrt(p),
}


@dataclass(frozen=True)
class WSD:
    """`warmup` steps from `initial` to 1, then 1, then `decay` steps of `shape` to `final`, of `steps` in all."""

    steps: int
    warmup: int
    decay: int
    shape: Shape
    final: float
    initial: float = 0.0

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
        done, stable_end = step + 1, self.steps - self.decay
        if done <= self.warmup:
            return self.initial + (1 - self.initial) * done / self.warmup
        if done <= stable_end or self.decay == 0:
            return 1.0
        progress = min(1.0, (done - stable_end) / self.decay)
        return self.final if progress == 1.0 else _FACTORS[self.shape](progress, self.final)

    def stages(self) -> tuple[Stage, ...]:
        """`warmup`, `stable` and `decay`."""
        stable = self.steps - self.warmup - self.decay
        return consecutive(("warmup", self.warmup), ("stable", stable), ("decay", self.decay))


class WSDConfig(Part):
    """Warmup, the peak rate, and a decay at the end of the run."""

    family: ClassVar[str] = "schedule"
    kind: Literal["wsd"] = "wsd"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")
    decay: float = Field(default=0.2, gt=0, description="fraction of the run if below 1, else steps")
    shape: Shape = Field(default="exponential", description="how the rate falls; sqrt falls fastest at first")
    final: float = Field(default=0.1, ge=0, le=1, description="factor of the peak rate at the last step")
    initial: float = Field(default=0.0, ge=0, le=1, description="factor of the peak rate from which the warmup rises")

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.shape == "exponential" and self.final == 0:
            raise ValueError(
                "an exponential decay never reaches final 0; give a final above 0 (0.1 is usual), or another shape, for "
                "example linear"
            )
        return self

    def build(self, steps: int) -> WSD:
        """The schedule of a run of `steps`.

        Raises:
            ConfigError: warmup and decay together are longer than the run.
        """
        warmup, decay = step_count(self.warmup, steps, "warmup"), step_count(self.decay, steps, "decay")
        if warmup + decay > steps:
            raise ConfigError(
                f"{warmup} steps of warmup and {decay} steps of decay are longer than the run of {steps} steps; shorten "
                "schedule.warmup or schedule.decay."
            )
        return WSD(steps, warmup, decay, self.shape, self.final, self.initial)
