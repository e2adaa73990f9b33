"""Protocols: how one peak rate serves several budgets T_1 < T_2 < …, as runs and branches with their cost.

    wsd-s           one run, a decay before every budget, and on from the decayed state at the peak
    wsd             one plateau; at every budget a branch decays, and is then thrown away
    cyclic-cosine   one run, a full cosine to the floor in every cycle, and back to the peak
    constant        one run at the peak: what the decays do not explain
    oracle          one cosine run for each budget: a reference that costs more, not a competitor

A protocol is a tuple of segments. A segment begins from a new model or from the state after another segment, and goes on with
the data of the step where it begins; its factors are the rates of its steps. Optimizer moments are carried along.

Equal cost has two meanings, and both are in use. With D_j the decay before budget T_j,

    compute   all that was spent until budget j is served, thrown-away decays included, is T_j. WSD's checkpoint j then has
              T_j − Σ_{i<j} D_i steps behind it.
    stable    WSD's checkpoint j has T_j steps behind it, and T_j + Σ_{i<j} D_i were spent. WSD-S is given as much: its cycles are
              longer by the earlier decays, so that both have the same stable steps; and so are the other single runs.

So `spent` at budget j is the same for wsd-s, wsd, cyclic-cosine and constant, in either meaning. The oracle's runs are as long as
that, each; all of them together cost more.

Step k of a warmup of w steps has the rate k/w in every protocol, as WSD-S counts, so that no protocol begins with more rate.

Pitfall: D_j is of the budget (the released configurations) or of the cycle T_j − T_(j−1) as asked, and the same in all protocols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Schedule, check_fit
from torchstone.optim.schedules.cycles import amount_steps, cycle_ends
from torchstone.optim.schedules.cyclic_cosine import CyclicCosine
from torchstone.optim.schedules.shapes import NEEDS_A_FLOOR, SHAPES, Shape
from torchstone.optim.schedules.warmup_then import WarmupThen
from torchstone.optim.schedules.wsd_s import WSDS, DecayOf

Name = Literal["wsd-s", "wsd", "cyclic-cosine", "constant", "oracle"]
Equal = Literal["compute", "stable"]


@dataclass(frozen=True)
class Segment:
    """A stretch of training.

    Attributes:
        parent: index of the segment after whose last step this one begins; None begins with a new model.
        begin: updates behind the state where it begins, which is also the step whose data comes first.
        factors: rate of each step as a multiple of the peak.
        serves: index of the budget that the state after it serves; None for a stretch of plateau that serves none.
    """

    parent: int | None
    begin: int
    factors: tuple[float, ...]
    serves: int | None

    @property
    def end(self) -> int:
        """Updates behind the state after it."""
        return self.begin + len(self.factors)


@dataclass(frozen=True)
class Protocol:
    """Segments in an order in which they can be trained, and what they cost.

    Attributes:
        name: which protocol.
        budgets: the budgets in steps.
        segments: parents before children.
    """

    name: Name
    budgets: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def total(self) -> int:
        """Updates of all segments together."""
        return sum(len(segment.factors) for segment in self.segments)

    def serving(self, budget: int) -> Segment:
        """The segment after which budget number `budget` is served."""
        return next(segment for segment in self.segments if segment.serves == budget)

    def spent(self, budget: int) -> int:
        """Updates made until budget number `budget` is served, those of other branches included."""
        last = self.segments.index(self.serving(budget))
        return sum(len(segment.factors) for segment in self.segments[: last + 1])

    def behind(self, budget: int) -> int:
        """Updates that lead to the state that serves budget number `budget`."""
        return self.serving(budget).end


@dataclass(frozen=True)
class _Setting:
    """What the protocols share: budgets, lengths of their decays, and steps spent until each is served."""

    budgets: tuple[int, ...]
    warmup: int
    decays: tuple[int, ...]
    shape: Shape
    floor: float
    ends: tuple[int, ...]


def protocol(
    name: Name,
    budgets: Sequence[int],
    warmup: int = 0,
    decay: float = 0.1,
    decay_of: DecayOf = "budget",
    shape: Shape = "inv",
    floor: float = 0.1,
    equal: Equal = "compute",
) -> Protocol:
    """The segments with which a protocol serves budgets.

    Args:
        name: wsd-s, wsd, cyclic-cosine, constant or oracle.
        budgets: steps at which a checkpoint is wanted, increasing.
        warmup: steps, once, at the beginning of every run.
        decay: of wsd-s and wsd, before each budget: a fraction up to 1 of what `decay_of` names, else steps.
        decay_of: `budget` or `cycle`.
        shape: of the decays of wsd-s and wsd; the cosines are cosines.
        floor: where decays and cosines lead, as a multiple of the peak.
        equal: what is equal among protocols; see the module.

    Raises:
        ConfigError: an unknown name or shape, a number out of its range, budgets that do not increase, or decays that do not fit.
    """
    if name not in _BUILDERS or equal not in ("compute", "stable"):
        raise ConfigError(
            f"there is no protocol {name!r} with equal {equal!r}; protocols: {', '.join(_BUILDERS)}; equal: compute, stable."
        )
    _check(budgets, warmup, decay, decay_of, shape, floor)
    served = cycle_ends(budgets[-1], tuple(budgets))
    cycles = [end - begin for begin, end in zip((0, *served), served, strict=False)]
    wholes = served if decay_of == "budget" else cycles
    decays = tuple(amount_steps(decay, whole, "decay") for whole in wholes)
    longer = decays if equal == "stable" else (0,) * len(decays)
    ends = tuple(end + sum(longer[:index]) for index, end in enumerate(served))
    for index, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        check_fit(0 if index else warmup, decays[index], end - begin, index)
        if decays[index] == 0:
            raise ConfigError(
                f"decay {decay:g} comes to no step before the budget of {served[index]} steps; give a larger one, or more steps."
            )
    return Protocol(name, served, _BUILDERS[name](_Setting(served, warmup, decays, shape, floor, ends)))


def _check(budgets: Sequence[int], warmup: int, decay: float, decay_of: DecayOf, shape: Shape, floor: float) -> None:
    """Raise ConfigError for settings that are wrong whatever the protocol."""
    if not budgets:
        raise ConfigError("a protocol needs at least one budget; give steps such as [1000, 2000].")
    given = list(budgets)
    if not all(_whole(budget) and budget > 0 for budget in given):
        raise ConfigError(f"budgets were given as {given}; each is a whole number of steps above 0.")
    if any(later <= earlier for earlier, later in pairwise(given)):
        raise ConfigError(f"budgets were given as {given}, which do not increase; give them in order, each once.")
    if not _whole(warmup) or warmup < 0:
        raise ConfigError(f"warmup was given as {warmup}; it is a whole number of steps, 0 or more.")
    if not 0 < decay < math.inf:
        raise ConfigError(f"decay was given as {decay}; it is a fraction up to 1 or a whole number of steps, above 0.")
    if decay_of not in get_args(DecayOf):
        raise ConfigError(f"decay_of was given as {decay_of!r}; it is one of {', '.join(get_args(DecayOf))}.")
    if shape not in SHAPES:
        raise ConfigError(f"there is no shape {shape!r} of a decay; shapes: {', '.join(SHAPES)}.")
    if not 0 <= floor <= 1:
        raise ConfigError(f"floor was given as {floor}; it is a multiple of the peak from 0 to 1.")
    if floor == 0 and shape in NEEDS_A_FLOOR:
        raise ConfigError(
            f"a decay of the shape {shape} never reaches floor 0; give a floor above 0 (0.1 is the paper's), or another shape, "
            "for example linear."
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_run(schedule: Schedule, setting: _Setting) -> tuple[Segment, ...]:
    """A single run, cut where it serves a budget."""
    cuts = enumerate(zip((0, *setting.ends), setting.ends, strict=False))
    return tuple(
        Segment(index - 1 if index else None, begin, _factors(schedule, setting.warmup, begin, end), index)
        for index, (begin, end) in cuts
    )


def _factors(schedule: Schedule, warmup: int, begin: int, end: int) -> tuple[float, ...]:
    """Rates of a stretch; the warmup is that of WSD-S in every protocol, whatever the schedule's own counting."""
    return tuple(step / warmup if step < warmup else schedule.factor(step) for step in range(begin, end))


def _wsd_s(setting: _Setting) -> tuple[Segment, ...]:
    warmups = (setting.warmup, *(0,) * (len(setting.ends) - 1))
    schedule = WSDS(setting.ends[-1], setting.ends, warmups, setting.decays, setting.shape, setting.floor)
    return _one_run(schedule, setting)


def _wsd(setting: _Setting) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    plateau: int | None = None  # index of the newest stretch of plateau
    begin = 0
    for budget, (end, decay) in enumerate(zip(setting.ends, setting.decays, strict=True)):
        behind = end - sum(setting.decays[:budget])  # thrown-away decays are spent, but not behind the state
        schedule = WSDS(behind, (behind,), (setting.warmup,), (decay,), setting.shape, setting.floor)
        if behind - decay > begin:
            segments.append(Segment(plateau, begin, _factors(schedule, setting.warmup, begin, behind - decay), None))
            plateau, begin = len(segments) - 1, behind - decay
        segments.append(Segment(plateau, begin, _factors(schedule, setting.warmup, begin, behind), budget))
    return tuple(segments)


def _cyclic(setting: _Setting) -> tuple[Segment, ...]:
    warmups = (setting.warmup, *(0,) * (len(setting.ends) - 1))
    return _one_run(CyclicCosine(setting.ends[-1], setting.ends, warmups, setting.floor), setting)


def _constant(setting: _Setting) -> tuple[Segment, ...]:
    return _one_run(WarmupThen(setting.ends[-1], setting.warmup, 1.0, "constant"), setting)


def _oracle(setting: _Setting) -> tuple[Segment, ...]:
    runs = [WarmupThen(end, setting.warmup, setting.floor, "cosine") for end in setting.ends]
    return tuple(Segment(None, 0, _factors(run, setting.warmup, 0, run.steps), index) for index, run in enumerate(runs))


_BUILDERS: dict[str, Callable[[_Setting], tuple[Segment, ...]]] = {
    "wsd-s": _wsd_s,
    "wsd": _wsd,
    "cyclic-cosine": _cyclic,
    "constant": _constant,
    "oracle": _oracle,
}
