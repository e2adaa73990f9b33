"""Schedules: the learning rate as a multiple of its peak, a pure function of the step.

Step s (0-based) of a run of S steps uses `peak * factor(s)`. Nothing has to be stored to resume: the step says it all. A
recipe builds a schedule of multiples, because its optimizer holds the peak. In Python the peak may be given:

    schedule = CosineConfig(warmup=100).build(1000, peak=6e-4)
    schedule.lr(250)                        the rate of the 251st update
    rates = schedule.torch(optimizer)       any optimizer of torch; rates.step() after optimizer.step()
    schedule.checkpoints()                  updates after which a decayed checkpoint is there to be saved
    schedule.plot("plan.svg")
    schedule.extend(2000, done=1000)        refused: a longer cosine would have given other rates to steps that were done

Every schedule divides the run into stages, named ranges of steps without gaps (`warmup`, `stable`, `decay`). What depends on
the schedule (`data_phases` of a recipe) names stages, not steps. A stage without steps is not there, and a name may come
more than once.

A schedule of one's own is a frozen dataclass below `Schedule` with `factor`, `stages` and, if a longer run is more than another
`steps`, `_longer`. Its fields are numbers, text or tuples of these, so that `state_dict` is plain data.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError

from torchstone.errors import CheckpointError, ConfigError
from torchstone.kinds import KINDS
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_class
from torchstone.storage.atomic import atomic_write

if TYPE_CHECKING:
    import torch

    from torchstone.optim.schedules.rates import ScheduledRates


@dataclass(frozen=True)
class Stage:
    """Steps `begin` … `end`-1 of a run."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Schedule(ABC):
    """The rate of every step of a run of `steps`; `peak` is the rate that factors multiply, if it is known here."""

    steps: int
    peak: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.peak is not None and not 0 <= self.peak < math.inf:
            raise ConfigError(f"a peak of {self.peak!r} is no rate; give a finite number above 0, such as 6e-4.")

    @abstractmethod
    def factor(self, step: int) -> float:
        """Factor of the peak rate at 0-based `step`; steps beyond the end keep the last factor.

        Raises:
            ConfigError: a step below 0 (`check_step`).
        """

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run in order; together they are all of its steps."""

    def lr(self, step: int) -> float:
        """The rate at 0-based `step`.

        Raises:
            ConfigError: the schedule was built without a peak.
        """
        if self.peak is None:
            raise ConfigError(
                "this schedule knows no peak rate; build it with one, for example build(1000, peak=6e-4), or use factor(step), "
                "which is the multiple of the peak."
            )
        return self.peak * self.factor(step)

    def checkpoints(self) -> tuple[int, ...]:
        """Numbers of updates after which a usable state is there: the end of every decay, and the end of the run."""
        ends = {stage.end for stage in self.stages() if stage.name == "decay"}
        return tuple(sorted(ends | {self.steps}))

    def torch(self, optimizer: torch.optim.Optimizer) -> ScheduledRates:
        """A scheduler of torch that sets the rates of any optimizer; see `torchstone.optim.schedules.rates`."""
        from torchstone.optim.schedules.rates import ScheduledRates

        return ScheduledRates(optimizer, self)

    def plot(self, path: str | Path, title: str = "Learning rate") -> Path:
        """Write a picture of rates, stages and checkpoints as an SVG file, and return its path.

        Raises:
            ConfigError: the file cannot be written there.
        """
        from torchstone.optim.schedules.plot import svg

        found = Path(path)
        try:
            atomic_write(found, svg(self, title))
        except OSError as error:
            raise ConfigError(
                f"{found} cannot be written ({error.strerror}); give the path of a file in a folder that is there, such as "
                "plan.svg."
            ) from error
        return found

    def first_change(self, other: Schedule, before: int, since: int = 0) -> int | None:
        """The first step from `since` on and below `before` whose factor differs in `other` by more than rounding, or None."""
        if self == other:
            return None
        steps = range(since, before)
        return next((step for step in steps if not _same(self.factor(step), other.factor(step))), None)

    def check_same(self, other: Schedule, done: int) -> None:
        """Raise ConfigError if `other` would have given other rates to the first `done` steps.

        Rates are compared where both schedules know their peak, and factors else.
        """
        rated = self.peak is not None and other.peak is not None
        if rated and self.peak != other.peak:
            step = next((step for step in range(done) if not _same(self.lr(step), other.lr(step))), None)
        else:
            step = self.first_change(other, done)
        if step is None:
            return
        before, after = (plan.lr(step) if rated else plan.factor(step) for plan in (self, other))
        unit = "" if rated else " of the peak"
        raise ConfigError(
            f"under the other plan the rate of step {step} changes from {before:.6g}{unit} to {after:.6g}{unit}, and {done} "
            "steps were done. Rates that were used must stay: keep the plan, change only steps that are still to come, or begin "
            "another run."
        )

    def extend(self, new_end: int, done: int | None = None) -> Self:
        """The same plan with a later end.

        Numbers of warmup and decay steps stay as they came out at first, also where they were given as fractions.

        Args:
            new_end: steps of the longer run.
            done: steps whose rates were used; None for all up to the old end.

        Raises:
            ConfigError: the end is not later, or a step that was done would have had another rate.
        """
        if new_end <= self.steps:
            raise ConfigError(f"an end of {new_end} steps is no later than the end of {self.steps}; give a larger one.")
        used = self.steps if done is None else done
        if not 0 <= used <= self.steps:
            raise ConfigError(f"{used} steps done do not fit a run of {self.steps} steps; give 0 to {self.steps}.")
        longer = self._longer(new_end)
        self.check_same(longer, used)
        return longer

    def _longer(self, new_end: int) -> Self:
        return replace(self, steps=new_end)

    def state_dict(self) -> dict[str, Any]:
        """The plan as plain data, for a checkpoint: the name of the class, and its fields."""
        return {"schedule": type(self).__name__, **{item.name: getattr(self, item.name) for item in fields(self)}}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Schedule:
        """The schedule that `state_dict` described.

        Raises:
            CheckpointError: the state is of no schedule known here, or its fields do not fit. ConfigError: its numbers are of
                no schedule.
        """
        known = _classes()
        cls = known.get(str(state.get("schedule")))
        settings = {name: value for name, value in state.items() if name != "schedule"}
        if cls is None or set(settings) != {item.name for item in fields(cls)}:
            raise CheckpointError(
                f"the stored schedule {state.get('schedule')!r:.60} with {', '.join(sorted(settings))[:200]} is none of those "
                f"known here: {', '.join(sorted(known))}. Restore it with the version that stored it."
            )
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        _check_types(cls, plain)
        return cls(**plain)  # type: ignore[arg-type]


class ScheduleConfig(Part):
    """Base of the schedules' configurations.

    Between schedules with cycles and those without, only numbers of steps carry over: a fraction is of a cycle in one, and of the
    run in the other.
    """

    family: ClassVar[str] = "schedule"
    in_cycles: ClassVar[bool] = False

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        kept = super().inherit(previous)
        if getattr(part_class("schedule", previous["kind"]), "in_cycles", False) == cls.in_cycles:
            return kept
        return {name: value for name, value in kept.items() if name not in ("warmup", "decay") or _counts_steps(value)}


def _counts_steps(value: Any) -> bool:
    return isinstance(value, int | float) and value > 1


def _check_types(cls: type[Schedule], plain: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every stored value has the type of its field."""
    hints = get_type_hints(cls)
    for name, value in plain.items():
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise CheckpointError(
                f"the stored schedule {cls.__name__} has {name}={value!r:.60}, which is of another type: "
                f"{error.errors(include_url=False)[0]['msg']}. Restore what was stored."
            ) from error


def _classes() -> dict[str, type[Schedule]]:
    """Every schedule class by name, those of the built-in kinds loaded."""
    for target in KINDS["schedule"].values():
        importlib.import_module(target.partition(":")[0])
    classes = list(Schedule.__subclasses__())
    for cls in classes:  # grows while it is read
        classes += cls.__subclasses__()
    return {cls.__name__: cls for cls in classes}


def consecutive(*lengths: tuple[str, int]) -> tuple[Stage, ...]:
    """Stages of (name, steps), one after the other from step 0; those without steps are left out."""
    stages: list[Stage] = []
    for name, length in lengths:
        begin = stages[-1].end if stages else 0
        if length > 0:
            stages.append(Stage(name, begin, begin + length))
    return tuple(stages)


def _same(one: float, other: float) -> bool:
    """Whether two rates or factors are equal up to rounding."""
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-15)


def check_steps(steps: int) -> None:
    """Raise ConfigError unless a run has a whole number of steps, at least one."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"a run of {steps!r} steps is none; give a whole number of steps, 1 or more.")


def check_step(step: int) -> None:
    """Raise ConfigError for a step before the first one."""
    if step < 0:
        raise ConfigError(f"there is no step {step}; the first one is 0.")


def check_finite(value: float, name: str) -> None:
    """Raise ConfigError for an amount that is no number of steps and no fraction."""
    if not 0 <= value < math.inf:
        raise ConfigError(
            f"{name} {value:g} is neither a fraction nor a number of steps; give a finite number, 0 or more."
        )


def step_count(value: float, steps: int, name: str) -> int:
    """Steps of a stage: a fraction of the run below 1, else a number of steps.

    Raises:
        ConfigError: a fractional number of steps; `name` is what the message calls it.
    """
    check_steps(steps)
    check_finite(value, name)
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


def check_fit(warmup: int, decay: int, steps: int, cycle: int | None = None) -> None:
    """Raise ConfigError if warmup and decay together are longer than the run, or than the cycle of that number."""
    if warmup + decay > steps:
        if cycle is not None:
            raise ConfigError(
                f"cycle {cycle}: warmup {warmup} + decay {decay} exceeds {steps} steps; shorten one of them, or give the cycle "
                "more steps."
            )
        raise ConfigError(
            f"{warmup} steps of warmup and {decay} steps of decay are longer than the run of {steps} steps; shorten "
            "schedule.warmup or schedule.decay."
        )
