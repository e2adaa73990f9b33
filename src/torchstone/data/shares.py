"""Shares of a mixture's sources in whole rows, constant or changing from one phase of a run to the next.

A batch of n rows gives source i the rows between round(n · (share 0 + … + share i−1)) and round(n · (share 0 + … + share i)).
Each source has rows of its own, numbered from 0, and uses them in order without a gap: the first row of source i at a
step has the number of rows of i in all steps before, whatever their phases.

`Timetable` knows these numbers for one batch size, at any step in time that does not depend on the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torchstone.errors import ConfigError, DataError

SLACK = 1e-6  # by which a sum of shares may miss 1


@dataclass(frozen=True)
class Phase:
    """Shares from step `begin` on, up to the next phase.

    Attributes:
        name: of the stage of the schedule, for messages.
        begin: first step, 0-based.
        shares: one for each source; a source whose share is 0 is absent.
    """

    name: str
    begin: int
    shares: tuple[float, ...]


def check_shares(shares: Sequence[float], sources: int, what: str, *, absent: bool) -> None:
    """Raise ConfigError unless there is one share for each source and they add up to 1.

    Args:
        shares: as they were given.
        sources: of the mixture.
        what: whose shares they are, for the message.
        absent: whether a share may be 0.
    """
    total = math.fsum(shares)
    least = min(shares, default=0.0)
    if len(shares) == sources and abs(total - 1) <= SLACK and (least > 0 or absent and least == 0):
        return
    listed = ", ".join(f"{share:g}" for share in shares)
    word = "share of 0 or more" if absent else "positive share"
    raise ConfigError(
        f"{what}: {sources} sources have the shares [{listed}], which add up to {total:.7g}; give one {word} for each, adding "
        "up to 1."
    )


def row_counts(shares: Sequence[float], rows: int, name: str = "") -> tuple[int, ...]:
    """Rows of each source among `rows`; raises DataError if a source with a share has none."""
    ends = [round(sum(shares[: i + 1]) * rows) for i in range(len(shares))]
    found = tuple(end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True))
    for source, (share, count) in enumerate(zip(shares, found, strict=True)):
        if share > 0 and count == 0:
            during = f" in the stage {name}" if name else ""
            raise DataError(
                f"{rows} sequences in shares {tuple(shares)} leave source {source} of the mixture without a row{during}; give "
                "more sequences (batch.sequences, evaluation.sequences), or larger shares."
            )
    return found


class Timetable:
    """Rows of each source at each step of a run.

    Args:
        phases: in order, the first from step 0 on.
        rows: of a batch.

    Raises:
        ConfigError: a source is absent from all phases.
        DataError: a source with a share has no row in the batches of a phase.

    Attributes:
        largest: for each source, its most rows in the batches of any phase.
        divisors: for each source, the greatest number that divides its rows in the batches of every phase, and with them the
            number of the first row of every batch.
    """

    def __init__(self, phases: Sequence[Phase], rows: int) -> None:
        assert phases and phases[0].begin == 0
        self._begins = [phase.begin for phase in phases]
        assert self._begins == sorted(set(self._begins)), "phases begin one after the other"
        self._counts = [row_counts(phase.shares, rows, phase.name) for phase in phases]
        columns = list(zip(*self._counts, strict=True))
        self.largest = tuple(max(column) for column in columns)
        self.divisors = tuple(math.gcd(*column) for column in columns)
        if 0 in self.largest:
            raise ConfigError(
                f"source {self.largest.index(0)} of the mixture is absent from all stages of the run "
                f"({', '.join(phase.name for phase in phases)}); give it a share in one of them (data_phases), or leave it out "
                "of data.sources."
            )
        self._before = [tuple(0 for _ in self.largest)]
        for index, begin in enumerate(self._begins[1:]):
            self._before.append(self._after(index, begin))

    def counts(self, step: int) -> tuple[int, ...]:
        """Rows of each source in the batch of `step`."""
        return self._counts[self._phase(step)]

    def before(self, step: int) -> tuple[int, ...]:
        """Rows of each source in all batches before `step`; also the number of its first row there."""
        return self._after(self._phase(step), step)

    def _phase(self, step: int) -> int:
        return bisect_right(self._begins, step) - 1

    def _after(self, phase: int, step: int) -> tuple[int, ...]:
        """Rows of each source before a step that lies in a phase, or where it ends."""
        steps = step - self._begins[phase]
        return tuple(
            before + steps * count for before, count in zip(self._before[phase], self._counts[phase], strict=True)
        )


def first_difference(one: Sequence[Phase], other: Sequence[Phase], steps: int) -> tuple[int, Phase, Phase] | None:
    """The first of `steps` steps at which two plans give other shares, and what they give; None if there is none."""
    for step in sorted({phase.begin for phase in (*one, *other)}):
        here, there = (plan[bisect_right([phase.begin for phase in plan], step) - 1] for plan in (one, other))
        if step < steps and here.shares != there.shares:
            return step, here, there
    return None
