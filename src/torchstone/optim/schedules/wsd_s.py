"""WSD-S: warmup, stable, decay, and again the peak from the decayed checkpoint on, in one run.

Wen, Li, Wang, Hall, Liang, Ma 2024, arXiv 2410.05192. Where WSD goes back to the plateau for every budget and throws each decay
away, WSD-S goes on from the decayed state: one branch, every decay kept, a usable checkpoint at the end of every cycle. Moments
of the optimizer and the order of data go on; only the rate jumps.

The run is cut at cycle ends c_1 < … < c_k = n (`torchstone.optim.schedules.cycles`). A cycle of L steps has w of warmup,
S = L − w − D stable, and D of decay:

    warmup   k = 0 … w−1    start + (1 − start) · k/w    start: `initial` in the first cycle, then the end of the cycle before
    stable                  1
    decay    k = 0 … D−1    a shape of `torchstone.optim.schedules.shapes`, `inv` in the paper

`warmup` is of the first cycle, `rewarmup` (0) of the later ones. `decay` as a fraction is of its cycle, or, with
`decay_of: budget`, of all steps up to the cycle's end, as in the released configurations.

There are two published readings, and they differ at every border:

    levanter   the above. The rate of step c_j is the first one of the next cycle, and the last step of a decay is one step above
               the floor.
    olmo       rate of step t in the period that ends at c_j: floor + (peak_j − floor) · min(c_j − t, D_j)/D_j, always linear.
               Step c_j itself is at the floor and still of the earlier period. The warmup is taken out of the first period; a
               period may have a peak of its own (`peaks`, multiples of the peak). At the end of the run and after it the rate is
               the floor. One period is the plain WSD of OLMo-core.

In both, the checkpoint of cycle j is the state after c_j updates.

Pitfalls
  fractions   with levanter they go up to 1, which is all of the cycle and not one step, and are truncated to steps; with olmo
              they are below 1 and rounded, and 1 is one step.
  counting    OLMo-core counts its updates from 1, here the first update is step 0; t above is the step.
  floor 0     `inv` and `exponential` never reach it, and are refused.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import (
    Schedule,
    ScheduleConfig,
    Stage,
    check_fit,
    check_step,
    consecutive,
    step_count,
)
from torchstone.optim.schedules.cycles import Amount, CycleLength, Cycles, Rest, amount_steps, check_cycles, cycle_ends
from torchstone.optim.schedules.shapes import NEEDS_A_FLOOR, SHAPES, Shape

DecayOf = Literal["cycle", "budget"]


@dataclass(frozen=True)
class WSDS(Schedule):
    """The reading of Levanter, resolved to steps.

    Attributes:
        ends: steps after which each cycle ends, the run's end last.
        warmups, decays: steps of each cycle.
        shape, final, initial: shape and floor of the decays, and where the first warmup begins.
        rewarmup, decay, decay_of: the settings from which an appended cycle is made.
    """

    ends: tuple[int, ...]
    warmups: tuple[int, ...]
    decays: tuple[int, ...]
    shape: Shape
    final: float
    initial: float = 0.0
    rewarmup: float = 0.0
    decay: float | None = None
    decay_of: DecayOf = "cycle"

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor."""
        check_step(step)
        step = min(step, self.steps - 1)
        cycle = bisect_right(self.ends, step)
        done = step - (self.ends[cycle - 1] if cycle else 0)
        if done < self.warmups[cycle]:
            start = self._floor_of(cycle - 1) if cycle else self.initial
            return start + (1 - start) * done / self.warmups[cycle]
        decayed = self.decays[cycle] - self.ends[cycle] + step
        return 1.0 if decayed < 0 else SHAPES[self.shape](decayed, self.decays[cycle], self.final)

    def _floor_of(self, cycle: int) -> float:
        """Where the decay of a cycle leads, one step after its last."""
        length = self.decays[cycle]
        return SHAPES[self.shape](length, length, self.final) if length else 1.0

    def stages(self) -> tuple[Stage, ...]:
        """`warmup`, `stable` and `decay` of every cycle."""
        begins = (0, *self.ends)
        cycles = zip(begins, self.ends, self.warmups, self.decays, strict=False)
        return consecutive(
            *(
                part
                for begin, end, warmup, decay in cycles
                for part in (("warmup", warmup), ("stable", end - begin - warmup - decay), ("decay", decay))
            )
        )

    def checkpoints(self) -> tuple[int, ...]:
        """Updates after which each cycle is complete."""
        return self.ends

    def _longer(self, new_end: int) -> Self:
        """With one cycle more, from the old end to the new one."""
        length = new_end - self.steps
        warmup = amount_steps(self.rewarmup, length, "rewarmup")
        decay = _decay_steps(self.decay, self.decay_of, length, new_end, warmup)
        check_fit(warmup, decay, length, len(self.ends))
        return replace(
            self,
            steps=new_end,
            ends=(*self.ends, new_end),
            warmups=(*self.warmups, warmup),
            decays=(*self.decays, decay),
        )


@dataclass(frozen=True)
class PeriodicWSDS(Schedule):
    """The reading of OLMo-core, resolved to steps.

    Attributes:
        ends: steps after which each period ends, the run's end last.
        warmup: steps of the one warmup, which the first period includes.
        decays, peaks: decay steps of each period, and its peak as a multiple of the run's.
        final, initial: the floor of every period and where the warmup begins, as multiples of the run's peak.
        decay: the setting from which an appended period is made.
    """

    ends: tuple[int, ...]
    warmup: int
    decays: tuple[int, ...]
    peaks: tuple[float, ...]
    final: float
    initial: float = 0.0
    decay: float | None = None

    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; at the end and beyond it is the floor."""
        check_step(step)
        if step >= self.steps:
            return self.final
        period = bisect_left(self.ends, step)
        peak, left = self.peaks[period], self.ends[period] - step
        if step < self.warmup:
            return self.initial + (peak - self.initial) * step / self.warmup
        if left == 0:
            return self.final
        return peak if left >= self.decays[period] else self.final + (peak - self.final) * left / self.decays[period]

    def stages(self) -> tuple[Stage, ...]:
        """`warmup`, then `stable` and `decay` of every period; a decay includes the border step at the floor."""
        parts, begin = [("warmup", self.warmup)], self.warmup
        for end, decay in zip(self.ends, self.decays, strict=True):
            last = min(end + 1, self.steps)
            parts += [("stable", end - decay - begin), ("decay", last - max(end - decay, begin))]
            begin = last
        return consecutive(*parts)

    def checkpoints(self) -> tuple[int, ...]:
        """Updates after which each period is complete."""
        return self.ends

    def _longer(self, new_end: int) -> Self:
        """With one period more, from the old end to the new one, at the peak of the last."""
        decay = _rounded(self.decay, new_end - self.steps, "decay", 0)
        check_fit(0, decay, new_end - self.steps, len(self.ends))
        return replace(
            self,
            steps=new_end,
            ends=(*self.ends, new_end),
            decays=(*self.decays, decay),
            peaks=(*self.peaks, self.peaks[-1]),
        )


def _decay_steps(decay: float | None, decay_of: DecayOf, length: int, end: int, warmup: int) -> int:
    """Decay steps of a cycle of `length` steps that ends after `end` steps."""
    if decay is None:
        return length - warmup
    return amount_steps(decay, end if decay_of == "budget" else length, "decay")


def _rounded(value: float | None, length: int, name: str, warmup: int) -> int:
    """Steps of an amount of `length` with style olmo; None for what a warmup leaves."""
    return length - warmup if value is None else step_count(value, length, name)


class WSDSConfig(ScheduleConfig):
    """Cycles of the peak rate and a decay, each from the decayed state of the one before."""

    in_cycles: ClassVar[bool] = True
    kind: Literal["wsd-s"] = "wsd-s"
    style: Literal["levanter", "olmo"] = Field(
        default="levanter", description="which published reading; olmo is linear, and its border steps are at the floor"
    )
    cycles: Cycles = None
    cycle_length: CycleLength = None
    warmup: Amount = Field(
        default=0.05, description="of the first cycle: fraction of it up to 1, else steps (style olmo: below 1)"
    )
    rewarmup: Amount = Field(default=0.0, description="of later cycles: fraction of the cycle up to 1, else steps")
    decay: Rest = Field(
        default=0.1,
        ge=0,
        description="fraction up to 1, else steps (style olmo: below 1); null: all that the warmup leaves of a cycle",
    )
    decay_of: DecayOf = Field(
        default="cycle", description="what a fraction is of: the cycle, or the budget, which is all steps up to its end"
    )
    shape: Shape | None = Field(default=None, description="how the rate falls; null: inv, or linear with style olmo")
    final: float = Field(default=0.1, ge=0, le=1, description="floor of the decays, as a factor of the peak rate")
    initial: float = Field(default=0.0, ge=0, le=1, description="factor of the peak rate from which the warmup rises")
    peaks: tuple[float, ...] = Field(
        default=(), description="style olmo: peak of each period as a factor of the peak rate; empty: 1 for all"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        check_cycles(self.cycles, self.cycle_length)
        if any(peak <= 0 for peak in self.peaks):
            raise ValueError(f"peaks are above 0; given: {', '.join(f'{peak:g}' for peak in self.peaks)}")
        if self.style == "olmo":
            self._check_olmo()
        elif self.peaks:
            raise ValueError(
                "peaks of single cycles are there with style olmo alone; leave them out, or set style to olmo"
            )
        if self.final == 0 and self._shape() in NEEDS_A_FLOOR:
            raise ValueError(
                f"a decay of the shape {self._shape()} never reaches final 0; give a final above 0 (0.1 is the paper's), or "
                "another shape, for example linear"
            )
        return self

    def _check_olmo(self) -> None:
        if self.shape not in (None, "linear"):
            raise ValueError(f"style olmo decays in a straight line; shape {self.shape} is there with style levanter")
        if self.rewarmup:
            raise ValueError("style olmo warms up once; leave rewarmup at 0, or set style to levanter")
        if self.decay_of != "cycle":
            raise ValueError(
                "style olmo takes fractions of each period; leave decay_of at cycle, or set style to levanter"
            )

    def _shape(self) -> Shape:
        return self.shape or ("linear" if self.style == "olmo" else "inv")

    def build(self, steps: int, peak: float | None = None) -> WSDS | PeriodicWSDS:
        """The schedule of a run of `steps`.

        Raises:
            ConfigError: the cycles do not fit the run, or warmup and decay a cycle.
        """
        ends = cycle_ends(steps, self.cycles, self.cycle_length)
        lengths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
        return self._periodic(ends, lengths, peak) if self.style == "olmo" else self._cyclic(ends, lengths, peak)

    def _cyclic(self, ends: tuple[int, ...], lengths: list[int], peak: float | None) -> WSDS:
        amounts = [self.warmup, *[self.rewarmup] * (len(ends) - 1)]
        warmups = [amount_steps(*pair, "warmup") for pair in zip(amounts, lengths, strict=True)]
        decays = [_decay_steps(self.decay, self.decay_of, *cycle) for cycle in zip(lengths, ends, warmups, strict=True)]
        for cycle, found in enumerate(zip(warmups, decays, lengths, strict=True)):
            check_fit(*found, cycle)
        return WSDS(
            ends[-1],
            ends,
            tuple(warmups),
            tuple(decays),
            self._shape(),
            self.final,
            self.initial,
            self.rewarmup,
            self.decay,
            self.decay_of,
            peak=peak,
        )

    def _periodic(self, ends: tuple[int, ...], lengths: list[int], peak: float | None) -> PeriodicWSDS:
        if self.peaks and len(self.peaks) != len(ends):
            raise ConfigError(f"{len(self.peaks)} peaks do not fit {len(ends)} periods; give one for each, or none.")
        warmup = _rounded(self.warmup, lengths[0], "warmup", 0)
        decays = [
            _rounded(self.decay, length, "decay", 0 if period else warmup) for period, length in enumerate(lengths)
        ]
        for period, (decay, length) in enumerate(zip(decays, lengths, strict=True)):
            check_fit(0 if period else warmup, decay, length, period)
        peaks = self.peaks or (1.0,) * len(ends)
        return PeriodicWSDS(
            ends[-1], ends, warmup, tuple(decays), peaks, self.final, self.initial, self.decay, peak=peak
        )


def wsd_s(
    total_steps: int,
    ends: Sequence[int] | None = None,
    peak: float | None = None,
    *,
    warmup: float | str = 0.0,
    decay: float | str | None = "10%",
    shape: Shape | None = None,
    floor: float = 0.1,
    style: Literal["levanter", "olmo"] = "levanter",
    **settings: Any,
) -> WSDS | PeriodicWSDS:
    """WSD-S of a run of `total_steps`, from Python.

    Args:
        ends: steps after which the cycles end; `total_steps` is appended if it is missing. Or give `cycles` or `cycle_length`.
        peak: the rate that `lr` multiplies; None for `factor` alone, or for the rates of an optimizer.
        settings: the other settings of WSDSConfig, such as `rewarmup`, `decay_of`, `peaks`.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    given = {"warmup": warmup, "decay": decay, "shape": shape, "final": floor, "style": style, **settings}
    if ends is not None:
        if settings.get("cycles") is not None:
            raise ConfigError("ends and cycles both say where the cycles end; give one of them.")
        if not isinstance(ends, Iterable) or isinstance(ends, str):
            raise ConfigError(
                f"ends is {ends!r}, and should be a list of steps such as [50, 100]; cycles=N makes N equal cycles."
            )
        given["cycles"] = tuple(ends)
    try:
        return WSDSConfig(**given).build(total_steps, peak)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(item) for item in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{name + ': ' if name else ''}{text}.") from error
