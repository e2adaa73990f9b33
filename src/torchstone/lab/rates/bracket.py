"""What a set of short runs says of learning rates: the stability edge, the best rate with an interval, a bracket.

Runs are paired: every rate is tried with the same seeds, so the same initial values and the same data.

    edge       between the highest rate at which every seed stayed stable and the lowest above it at which one diverged
    best       for each seed the lowest point of the parabola through its best rate and that rate's neighbours, in log₂ of the
               rate; the mean over seeds and its t interval, turned back into rates
    bracket    the rates around the best at which the mean loss is within `tolerance` of the lowest mean, every seed stable; its
               ends are where the line through the means (straight in log₂ of the rate) crosses that height

Pitfalls
  short runs   the best rate of a short run is usually above that of a long one, and the edge of a long run may be lower.
  end of the   where the best rate is the lowest or the highest stable one that was tried, a parabola says nothing, and the seed
  grid         counts with that rate itself. `open_low` and `open_high` say where the bracket ends because nothing lower, or
               nothing higher that is stable, was tried.
  too short    where the best rate has gained no more than `LEAST_GAIN` tolerances since the first update, rates cannot be told
               apart, and every one of them lies in the bracket (`told_apart`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchstone.errors import StudyError
from torchstone.stats.estimate import Estimate, t_estimate

LEAST_GAIN = 5.0


@dataclass(frozen=True)
class Trial:
    """One short run: its held-out loss, or the update after which it diverged; `first` is the loss before any update."""

    rate: float
    seed: int
    loss: float | None
    diverged_at: int | None = None
    first: float | None = None

    @property
    def stable(self) -> bool:
        """Whether it reached its end."""
        return self.loss is not None


@dataclass(frozen=True)
class RateSummary:
    """All trials of one rate.

    Attributes:
        mean: of the losses; None unless every seed is stable.
        above: paired difference to the losses of the rate with the lowest mean; None likewise.
        diverged: seeds that diverged.
    """

    rate: float
    mean: float | None
    above: Estimate | None
    diverged: tuple[int, ...]


@dataclass(frozen=True)
class Bracket:
    """Attributes:

    rates: every rate in order.
    stable_to: highest rate below the first unstable one; unstable_from: that one, None if no seed diverged anywhere.
    lowest: the tried rate with the lowest mean loss.
    best: log₂ of the best rate over seeds, as an estimate; see `best_rate` and `best_interval`.
    low, high: the recommended bracket.
    open_low, open_high: the bracket ends there for lack of rates that were tried, or at the edge.
    told_apart: the best rate has gained enough for rates to differ.
    """

    rates: tuple[RateSummary, ...]
    stable_to: float
    unstable_from: float | None
    lowest: float
    best: Estimate
    low: float
    high: float
    open_low: bool
    open_high: bool
    told_apart: bool

    @property
    def best_rate(self) -> float:
        """The best rate."""
        return 2**self.best.effect

    @property
    def best_interval(self) -> tuple[float, float] | None:
        """Its interval within what was tried below the edge; None for a single seed or equal ones."""
        if self.best.low is None or self.best.high is None:
            return None
        ends = self.rates[0].rate, self.unstable_from or self.rates[-1].rate
        return max(2**self.best.low, ends[0]), min(2**self.best.high, ends[1])


def bracket_of(trials: Sequence[Trial], tolerance: float) -> Bracket:
    """Edge, best rate and bracket.

    Args:
        trials: every rate with the same seeds.
        tolerance: nats above the lowest mean loss that a rate of the bracket may have.

    Raises:
        StudyError: no rate below the edge is stable in every seed.
    """
    by_rate = _by_rate(trials)
    unstable = [rate for rate, found in by_rate.items() if not all(trial.stable for trial in found.values())]
    edge = min(unstable, default=None)
    stable = [rate for rate in by_rate if edge is None or rate < edge]
    if not stable:
        raise StudyError(
            f"even the lowest rate that was tried, {min(by_rate):g}, diverged in a seed; lower optimizer.learning_rate, or look "
            "at the data and the model first."
        )
    means = {rate: _mean(by_rate[rate]) for rate in stable}
    lowest = min(stable, key=lambda rate: (means[rate], rate))
    at, height = stable.index(lowest), means[lowest] + tolerance
    curve = [(math.log2(rate), means[rate]) for rate in stable]
    low, high = _crossing(curve[at::-1], height), _crossing(curve[at:], height)
    firsts = [trial.first for trial in by_rate[lowest].values() if trial.first is not None]
    gained = sum(firsts) / len(firsts) - means[lowest] if firsts else math.inf
    seeds = sorted(next(iter(by_rate.values())))
    optima = [_optimum([(rate, _loss(by_rate[rate][seed])) for rate in stable]) for seed in seeds]
    return Bracket(
        rates=tuple(_summary(rate, found, by_rate[lowest]) for rate, found in by_rate.items()),
        stable_to=stable[-1],
        unstable_from=edge,
        lowest=lowest,
        best=t_estimate(optima),
        low=2**low,
        high=2**high,
        open_low=low == curve[0][0],
        open_high=high == curve[-1][0],
        told_apart=gained > LEAST_GAIN * tolerance,
    )


def _by_rate(trials: Sequence[Trial]) -> dict[float, dict[int, Trial]]:
    found: dict[float, dict[int, Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.rate, trial.seed)):
        found.setdefault(trial.rate, {})[trial.seed] = trial
    seeds = {frozenset(by_seed) for by_seed in found.values()}
    assert len(seeds) == 1, "every rate is tried with the same seeds"
    return found


def _loss(trial: Trial) -> float:
    assert trial.loss is not None
    return trial.loss


def _mean(found: Mapping[int, Trial]) -> float:
    return sum(_loss(trial) for trial in found.values()) / len(found)


def _summary(rate: float, found: Mapping[int, Trial], best: Mapping[int, Trial]) -> RateSummary:
    diverged = tuple(seed for seed, trial in found.items() if not trial.stable)
    if diverged:
        return RateSummary(rate, None, None, diverged)
    pairs = [_loss(trial) - _loss(best[seed]) for seed, trial in found.items()]
    return RateSummary(rate, _mean(found), t_estimate(pairs), ())


def _crossing(points: Sequence[tuple[float, float]], height: float) -> float:
    """Where the line through the points, which begins at or below the height, first crosses it; else its end."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y1 > height:
            return x0 + (x1 - x0) * (height - y0) / (y1 - y0)
    return points[-1][0]


def _optimum(points: Sequence[tuple[float, float]]) -> float:
    """log₂ of the rate at the lowest point of the parabola through the best rate and its two neighbours."""
    at = min(range(len(points)), key=lambda index: points[index][1])
    if not 0 < at < len(points) - 1:
        return math.log2(points[at][0])
    (x0, y0), (x1, y1), (x2, y2) = ((math.log2(rate), loss) for rate, loss in points[at - 1 : at + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return (x0 + x1) / 2 - left * (x2 - x0) / (2 * (right - left)) if right > left else x1
