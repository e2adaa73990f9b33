"""Cycles: where a run of n steps is cut, and how many steps an amount of a cycle is.

A run is cut at cycle ends 0 < c_1 < … < c_k = n. They are given in one of these ways:

    cycles: 4                   ends at int(n/4 · i)
    cycles: [125, 250]          these ends; n is appended if it is missing
    cycle_length: 100           ends at 100 · i for i = 1 … n//100 − 1, and n
    cycle_length: 0.25          the same with int(0.25 · n) steps; "25%" is another way to write it
    cycle_length: [100, 200]    lengths one after the other; n is appended if they do not reach it
    neither                     one cycle

An amount of a cycle (warmup, decay) is a fraction up to 1, truncated to whole steps, or a whole number of steps above 1. So 1 is
all of the cycle, not one step, unlike the `warmup` and `decay` of the schedules without cycles.

Pitfall: if `cycle_length: 100` does not divide the run, the last cycle is longer than the others, not shorter (330 steps have
ends 100, 200, 330). The published code does the same, and its warning says the opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import check_finite, check_steps


def _percent(value: Any) -> Any:
    """0.1 for "10%"; anything else as it is, but true and false, which pydantic would read as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is due, not true or false")
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Amount = Annotated[float, BeforeValidator(_percent), Field(ge=0)]
Rest = Annotated[float | None, BeforeValidator(_percent)]  # None: all that is left
Cycles = Annotated[
    int | tuple[int, ...] | None,
    Field(description="number of equal cycles, or list of the steps after which they end; null: see cycle_length"),
]
CycleLength = Annotated[
    float | tuple[int, ...] | None,
    BeforeValidator(_percent),
    Field(description="steps of a cycle, a fraction of the run up to 1, or list of lengths; null: see cycles"),
]


def check_cycles(cycles: int | Sequence[int] | None, cycle_length: float | Sequence[int] | None) -> None:
    """Raise ValueError for both ways at once, and for numbers that are no cycles whatever the run."""
    if cycles is not None and cycle_length is not None:
        raise ValueError("cycles and cycle_length both say where the cycles end; give one of them")
    for name, given in (("cycles", cycles), ("cycle_length", cycle_length)):
        numbers = [] if given is None else [given] if isinstance(given, int | float) else list(given)
        least = "above 0" if name == "cycle_length" else "1 or more"
        if any(number <= 0 for number in numbers) or numbers == [] and given is not None:
            raise ValueError(f"{name} {given!r} holds no cycle; numbers are {least}, and a list is not empty")
    if isinstance(cycle_length, int | float):
        amount_steps(cycle_length, 1, "cycle_length")


def amount_steps(value: float, length: int, name: str) -> int:
    """Steps of an amount of `length` steps: a fraction up to 1, truncated, or a whole number of steps above 1.

    Raises:
        ConfigError: a number above 1 that is not whole; `name` is what the message calls it.
    """
    check_finite(value, name)
    if value > 1 and value != int(value):
        raise ConfigError(
            f'{name} {value:g} is neither a fraction up to 1 nor a whole number of steps; write 0.1 or "10%" for a tenth, or '
            "for example 150 for steps."
        )
    return int(value * length) if value <= 1 else int(value)


def cycle_ends(
    steps: int, cycles: int | Sequence[int] | None = None, cycle_length: float | Sequence[int] | None = None
) -> tuple[int, ...]:
    """The ends of the cycles of a run of `steps`, the run's own end last; given in one way, see `check_cycles`.

    Raises:
        ConfigError: more cycles than steps, ends that do not increase, or ends beyond the run.
    """
    check_steps(steps)
    given = cycles if cycles is not None else cycle_length
    count = len(given) if isinstance(given, Sequence) else cycles
    if isinstance(count, int) and count > steps:
        name = "cycles" if cycles is not None else "cycle_length"
        raise ConfigError(
            f"{name} asks for {count:,} cycles, and the run has {steps:,} steps; every cycle needs at least one. Give fewer, or "
            "a larger budget."
        )
    ends = _ends(steps, cycles, cycle_length)
    for cycle, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        if end <= begin:
            raise ConfigError(
                f"cycle {cycle} would begin after {begin} steps and end after {end}: ends do not increase. Give them in order, "
                f"each cycle at least one of the {steps} steps."
            )
    if ends and ends[-1] > steps:
        raise ConfigError(
            f"a cycle would end after {ends[-1]} steps, beyond the run of {steps} steps; give earlier ends, or a larger budget."
        )
    return ends if ends and ends[-1] == steps else (*ends, steps)


def _ends(
    steps: int, cycles: int | Sequence[int] | None, cycle_length: float | Sequence[int] | None
) -> tuple[int, ...]:
    if isinstance(cycles, int):
        return tuple(int(steps / cycles * index) for index in range(1, cycles))
    if cycles is not None:
        return tuple(cycles)
    if cycle_length is None:
        return (steps,)
    if not isinstance(cycle_length, int | float):
        return tuple(accumulate(cycle_length))
    length = amount_steps(cycle_length, steps, "cycle_length")
    if length < 1:
        raise ConfigError(
            f"cycle_length {cycle_length:g} is no whole step of a run of {steps} steps; give a larger one."
        )
    return tuple(index * length for index in range(1, steps // length))
