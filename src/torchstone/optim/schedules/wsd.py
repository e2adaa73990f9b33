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
  budget      `decay` as a fraction moves its beginning with the budget: continuing a run whose decay had begun under a larger one
              is refused, because steps that are done would have had other rates. Extend before the decay, or branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from torchstone.optim.schedules.base import ScheduleConfig, check_step
from torchstone.optim.schedules.shapes import OF_SHARE
from torchstone.optim.schedules.three_stages import ThreeStages, fitted

Shape = Literal["exponential", "linear", "cosine", "sqrt"]


@dataclass(frozen=True)
class WSD(ThreeStages):
    """`warmup` steps from `initial` to 1, then 1, then `decay` steps of `shape` to `final`, of `steps` in all."""

    shape: Shape
    final: float
    initial: float = 0.0

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
        check_step(step)
        done, stable_end = step + 1, self.steps - self.decay
        if done <= self.warmup:
            return self.initial + (1 - self.initial) * done / self.warmup
        if done <= stable_end or self.decay == 0:
            return 1.0
        progress = min(1.0, (done - stable_end) / self.decay)
        return self.final if progress == 1.0 else OF_SHARE[self.shape](progress, self.final)


class WSDConfig(ScheduleConfig):
    """Warmup, the peak rate, and a decay at the end of the run."""

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

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        """Without a shape that is not one of its own, and without a decay of no step."""
        kept = super().inherit(previous)
        refused = {"shape": kept.get("shape") not in OF_SHARE, "decay": not kept.get("decay")}
        return {name: value for name, value in kept.items() if not refused.get(name, False)}

    def build(self, steps: int, peak: float | None = None) -> WSD:
        """The schedule of a run of `steps`.

        Raises:
            ConfigError: warmup and decay together are longer than the run.
        """
        warmup, decay = fitted(self.warmup, self.decay, steps)
        return WSD(steps, warmup, decay, self.shape, self.final, self.initial, peak=peak)
