"""Cyclic cosine: a full cosine to the floor in every cycle, and back to the peak (SGDR; Loshchilov, Hutter 2017, 1608.03983).

The run is cut at cycle ends (`torchstone.optim.schedules.cycles`). In a cycle of L steps with w of warmup, step k has

    warmup   k = 0 … w−1    start + (1 − start) · (k + 1)/w    start: 0 in the first cycle, then `final`
    decay    k = w … L−1    final + (1 − final) · ½ (1 + cos πp),   p = (k − w) / (L − 1 − w)

so that the last step of every cycle has exactly `final`, and one cycle is `cosine`, step for step. The checkpoint of a cycle is
the state after its last step.

Pitfall: `wsd-s` with `decay: null` and `shape: cosine` is the published code's cyclic cosine, which counts differently: its last
step of a cycle is one step above the floor.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Schedule, ScheduleConfig, Stage, check_step, consecutive
from torchstone.optim.schedules.cycles import Amount, CycleLength, Cycles, amount_steps, check_cycles, cycle_ends


@dataclass(frozen=True)
class CyclicCosine(Schedule):
    """Cycles that end after `ends` steps, with `warmups` steps each, down to `final`.

    `rewarmup` is the setting from which the warmup of an appended cycle is made.
    """

    ends: tuple[int, ...]
    warmups: tuple[int, ...]
    final: float
    rewarmup: float = 0.0

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
        check_step(step)
        step = min(step, self.steps - 1)
        cycle = bisect_right(self.ends, step)
        begin = self.ends[cycle - 1] if cycle else 0
        done, warmup = step - begin, self.warmups[cycle]
        if done < warmup:
            start = self.final if cycle else 0.0
            return start + (1 - start) * ((done + 1) / warmup)
        span = self.ends[cycle] - begin - 1 - warmup
        progress = (done - warmup) / span if span > 0 else 1.0
        return self.final + (1 - self.final) * (0.5 * (1 + math.cos(math.pi * progress)))

    def stages(self) -> tuple[Stage, ...]:
        """`warmup` and `decay` of every cycle."""
        cycles = zip((0, *self.ends), self.ends, self.warmups, strict=False)
        return consecutive(
            *(part for begin, end, warmup in cycles for part in (("warmup", warmup), ("decay", end - begin - warmup)))
        )

    def checkpoints(self) -> tuple[int, ...]:
        """Updates after which each cycle is complete."""
        return self.ends

    def _longer(self, new_end: int) -> Self:
        """With one cycle more, from the old end to the new one."""
        warmup = _warmup(len(self.ends), self.rewarmup, new_end - self.steps)
        return replace(self, steps=new_end, ends=(*self.ends, new_end), warmups=(*self.warmups, warmup))


def _warmup(cycle: int, amount: float, length: int) -> int:
    """Steps of warmup of a cycle, which leave some of it."""
    warmup = amount_steps(amount, length, "rewarmup" if cycle else "warmup")
    if warmup >= length:
        raise ConfigError(
            f"cycle {cycle}: {warmup} steps of warmup leave nothing of {length} steps; shorten it, or give the cycle more steps."
        )
    return warmup


class CyclicCosineConfig(ScheduleConfig):
    """A cosine to the floor in every cycle, and back to the peak."""

    in_cycles: ClassVar[bool] = True
    kind: Literal["cyclic-cosine"] = "cyclic-cosine"
    cycles: Cycles = None
    cycle_length: CycleLength = None
    warmup: Amount = Field(default=0.05, description="of the first cycle: fraction of it up to 1, else steps")
    rewarmup: Amount = Field(default=0.0, description="of later cycles: fraction of the cycle up to 1, else steps")
    final: float = Field(default=0.1, ge=0, le=1, description="factor of the peak rate at the last step of every cycle")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        check_cycles(self.cycles, self.cycle_length)
        return self

    def build(self, steps: int, peak: float | None = None) -> CyclicCosine:
        """The schedule of a run of `steps`.

        Raises:
            ConfigError: the cycles do not fit the run, or a warmup leaves nothing of its cycle.
        """
        ends = cycle_ends(steps, self.cycles, self.cycle_length)
        amounts = (self.warmup, *(self.rewarmup,) * (len(ends) - 1))
        lengths = (end - begin for begin, end in zip((0, *ends), ends, strict=False))
        warmups = tuple(_warmup(cycle, *pair) for cycle, pair in enumerate(zip(amounts, lengths, strict=True)))
        return CyclicCosine(steps, ends, warmups, self.final, self.rewarmup, peak=peak)
