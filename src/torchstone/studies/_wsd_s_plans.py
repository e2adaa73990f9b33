"""The protocols of the WSD-S study as runs, and how they are trained without doing anything twice.

A run is the rates that lead to one budget's checkpoint, from step 0 on, as factors of the peak (`optim.schedules.protocols`).
What a model is after s steps depends on its seed and the first s rates alone, because step s reads batch s of the seed's data
whatever came before. So runs that begin alike are one run until they part, and what a protocol costs are the steps of the tree
of its runs.

    wsd-s            one run; the last D_j steps before every T_j decay, then the rate is back at the peak
    wsd              a plateau with a decay of D_j steps for every budget that is thrown away. Equal compute: checkpoint j has
                     T_j − D_1 − … − D_{j−1} steps behind it
    wsd-free         the same with T_j steps behind checkpoint j: earlier decays cost nothing
    wsd-s-rewarmed   wsd-s with a warmup from the floor after every decay
    cyclic           one run; in every cycle a cosine from the peak to the floor
    oracle           a run of its own for every budget, with one cosine
    constant         the peak rate throughout

D_j = fraction · T_j. Decays have the shape `inv`, the paper's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torchstone.optim.schedules.protocols import protocol
from torchstone.optim.schedules.wsd_s import WSDSConfig

Factors = tuple[float, ...]
_PROTOCOLS: dict[str, dict[str, Any]] = {
    "wsd-s": {"name": "wsd-s"},
    "wsd": {"name": "wsd"},
    "wsd-free": {"name": "wsd", "equal": "stable"},
    "cyclic": {"name": "cyclic-cosine"},
    "oracle": {"name": "oracle"},
    "constant": {"name": "constant"},
}


@dataclass(frozen=True)
class Plan:
    """Runs of a protocol, one for each budget.

    Attributes:
        runs: the rates up to each budget's checkpoint.
        before: the step at which each checkpoint's decay begins; its end where there is none.
    """

    runs: tuple[Factors, ...]
    before: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Steps that are trained, shared beginnings once."""
        return sum(len(run) - start for run, (_, start) in zip(self.runs, partings(self.runs), strict=True))


def plan_of(name: str, settings: Mapping[str, Any], budgets: int | None = None) -> Plan:
    """The runs of a protocol, for the first `budgets` of `settings["ends"]`.

    Args:
        settings: `ends`, `warmup` (steps), `rewarmup` (steps), `fraction`, `floor`.
    """
    ends = tuple(settings["ends"][:budgets])
    common = {"warmup": settings["warmup"], "floor": settings["floor"]}
    if name == "wsd-s-rewarmed":
        schedule = WSDSConfig(
            cycles=ends, warmup=settings["warmup"], rewarmup=settings["rewarmup"], decay=settings["fraction"],
            decay_of="budget", final=settings["floor"],
        ).build(ends[-1])  # fmt: skip
        whole = tuple(schedule.factor(step) for step in range(ends[-1]))
        runs: tuple[Factors, ...] = tuple(whole[:end] for end in ends)
    else:
        made = protocol(budgets=ends, decay=settings["fraction"], **common, **_PROTOCOLS[name])
        runs = tuple(_path(made, budget) for budget in range(len(ends)))
    return Plan(runs, tuple(_decay_begins(name, run, end, settings) for run, end in zip(runs, ends, strict=True)))


def _path(made: Any, budget: int) -> Factors:
    """All rates from step 0 to a budget's checkpoint."""
    factors: Factors = ()
    segment = made.serving(budget)
    while segment is not None:
        factors = segment.factors + factors
        segment = None if segment.parent is None else made.segments[segment.parent]
    return factors


def _decay_begins(name: str, run: Factors, end: int, settings: Mapping[str, Any]) -> int:
    if name == "constant":
        return len(run)
    if name in ("cyclic", "oracle"):
        return max(step for step, factor in enumerate(run) if factor == 1.0)
    return len(run) - int(settings["fraction"] * end)


def partings(runs: Sequence[Factors]) -> list[tuple[int, int]]:
    """For every run the earlier run that it shares the longest beginning with, and how long that is; (-1, 0) for none."""
    found = []
    for i, run in enumerate(runs):
        length, parent = max(((_alike(run, runs[j]), -j) for j in range(i)), default=(0, 1))
        found.append((-parent, length) if length else (-1, 0))
    return found


def _alike(a: Factors, b: Factors) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Learner(Protocol):
    """What is trained: it can be put back to any state that it was in."""

    def state(self) -> Any:
        """Weights and moments, copied."""
        ...

    def load(self, state: Any) -> None:
        """Put a state back; it may be loaded again later."""
        ...

    def advance(self, step: int, factor: float) -> None:
        """One update with batch `step` at `factor` times the peak rate."""
        ...


def follow(
    runs: Sequence[Factors], learner: Learner, looks: Callable[[int], set[int]], look: Callable[[int, int], None]
) -> None:
    """Train all runs from the learner's present state, shared beginnings once.

    Args:
        runs: rates from step 0 on.
        looks: run → steps at which to look at it.
        look: called with run and step once that many steps are done. Of a beginning that an earlier run had, only the last
            step is seen again.
    """
    parted = partings(runs)
    wanted = {parting for parting in parted if parting[1]}
    saved = {(-1, 0): learner.state()}
    for i, run in enumerate(runs):
        learner.load(saved[parted[i]])
        seen = looks(i)
        for step, factor in _steps(run, parted[i][1]):
            if step in seen:
                look(i, step)
            if (i, step) in wanted:
                saved[i, step] = learner.state()
            if factor is not None:
                learner.advance(step, factor)


def _steps(run: Factors, start: int) -> Iterator[tuple[int, float | None]]:
    """Steps from `start` on with their factors, and the end, which has none."""
    for step in range(start, len(run)):
        yield step, run[step]
    yield len(run), None
