"""Learning-rate schedules as a factor of the peak rate: warmup, then constant, linear or cosine.

A schedule is a pure function of the step, so that nothing about it is stored or resumed. Step s (0-based) of S uses
factor(s). Warmup rises linearly from 1/w to 1 over w steps; `linear` and `cosine` then fall to `final` at the last step.

    cosine   final + (1 − final) · ½ (1 + cos πp),   p = (s − w) / (S − 1 − w)

Every schedule divides the run into stages, named ranges of steps without gaps: `warmup`, then `stable` (constant) or `decay`
(linear, cosine). What depends on the schedule (`data_phases` of a recipe) names stages, not steps. A stage without steps
is not there, and a name may come more than once. `wsd` is in `torchstone.optim.wsd`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from pydantic import Field

from torchstone.errors import ConfigError
from torchstone.recipe.part import Part


@dataclass(frozen=True)
class Stage:
    """Steps `begin` … `end`-1 of a run."""

    name: str
    begin: int
    end: int


class Schedule(Protocol):
    """What training asks of a schedule."""

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
        ...

    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run in order; together they are all of its steps."""
        ...


def consecutive(*lengths: tuple[str, int]) -> tuple[Stage, ...]:
    """Stages of (name, steps), one after the other from step 0; those without steps are left out."""
    stages: list[Stage] = []
    for name, length in lengths:
        begin = stages[-1].end if stages else 0
        if length > 0:
            stages.append(Stage(name, begin, begin + length))
    return tuple(stages)


@dataclass(frozen=True)
class WarmupThen:
    """Warmup, then `shape` from 1 to `final`."""

    steps: int
    warmup: int
    final: float
    shape: Literal["constant", "linear", "cosine"]

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
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


def step_count(value: float, steps: int, name: str) -> int:
    """Steps of a stage: a fraction of the run below 1, else a number of steps.

    Raises:
        ConfigError: a fractional number of steps; `name` is what the message calls it.
    """
    count = round(value * steps) if value < 1 else int(value)
    if value >= 1 and value != count:
        raise ConfigError(f"{name} {value:g} is neither a fraction below 1 nor a whole number of steps.")
    return count


def warmup_steps(warmup: float, steps: int) -> int:
    """Steps of warmup: a fraction of the run below 1, else a number of steps.

    Raises:
        ConfigError: a warmup as long as the run or longer, or a fractional number of steps.
    """
    count = step_count(warmup, steps, "warmup")
    if count >= steps and count > 0:
        raise ConfigError(f"{count} steps of warmup leave nothing of a run of {steps} steps; shorten schedule.warmup.")
    return count


class ConstantConfig(Part):
    """`schedule: constant`."""

    family: ClassVar[str] = "schedule"
    kind: Literal["constant"] = "constant"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")

    def build(self, steps: int) -> Schedule:
        """The schedule of a run of `steps`."""
        return WarmupThen(steps, warmup_steps(self.warmup, steps), 1.0, "constant")


class LinearConfig(Part):
    """`schedule: linear`."""

    family: ClassVar[str] = "schedule"
    kind: Literal["linear"] = "linear"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")
    final: float = Field(default=0.0, ge=0, le=1, description="factor of the peak rate at the last step")

    def build(self, steps: int) -> Schedule:
        """The schedule of a run of `steps`."""
        return WarmupThen(steps, warmup_steps(self.warmup, steps), self.final, "linear")


class CosineConfig(Part):
    """`schedule: cosine`."""

    family: ClassVar[str] = "schedule"
    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, description="fraction of the run if below 1, else steps")
    final: float = Field(default=0.1, ge=0, le=1, description="factor of the peak rate at the last step")

    def build(self, steps: int) -> Schedule:
        """The schedule of a run of `steps`."""
        return WarmupThen(steps, warmup_steps(self.warmup, steps), self.final, "cosine")
