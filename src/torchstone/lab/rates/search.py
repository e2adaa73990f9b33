"""Find the learning rates at which a recipe trains well: short paired runs, widened until both sides are seen, then refined.

    found = torchstone.learning_rates("recipes/tiny.yaml", seeds=3)
    found.bracket.low, found.bracket.high, found.bracket.stable_to

Rounds
  1   the recipe's own rate, and 4 and 16 times more and less
  2…  factor-4 steps below until the bracket has a lower end; above until a seed diverges or the loss is `CLEARLY` higher than
      the lowest; at most 2^10 times the recipe's rate away from it
  fine  rates halfway (a factor 2) around the best one and inside the edge, then again (a factor √2)

A run is the recipe with a budget of few steps, its schedule drawn together to that length (`torchstone.lab.rates.short`). It ends
early once it has diverged (`torchstone.lab.rates.divergence`). Cells run in the study runner: in parallel, each once; the same
command continues.

Pitfall: rates are ranked by held-out loss, whatever decides a comparison that uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError, StudyError
from torchstone.lab.progress import Progress
from torchstone.lab.rates.bracket import Bracket, Trial, bracket_of
from torchstone.lab.rates.short import shortened
from torchstone.lab.rates.trials import SCALE, RateTrials, rate_name
from torchstone.lab.runner import RunOptions, StudyRun
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import steps_of

FIRST_SEED = 2_000_000  # of no comparison and no tuning
FARTHEST = 2.0**10
CLEARLY = 0.5  # nats above the lowest mean at which a rate is clearly too high


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        bracket: edge, best rate and recommended rates.
        trials: every short run.
        steps: updates of a short run. whole: those of the recipe.
        seeds: of the pairs.
        tolerance: nats, see `bracket_of`.
    """

    bracket: Bracket
    trials: tuple[Trial, ...]
    steps: int
    whole: int
    seeds: int
    tolerance: float


@dataclass(frozen=True)
class Plan:
    """Settings of a search: updates of a short run (None: a tenth of the recipe's, at least 100), seeds, nats of tolerance."""

    steps: int | None = None
    seeds: int = 3
    tolerance: float = 0.02

    def check(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        if self.seeds < 1 or not self.tolerance >= 0 or (self.steps is not None and self.steps < 10):
            raise ConfigError(
                f"a search needs at least 1 seed, 10 steps and a tolerance of at least 0; given {self.seeds} seeds, {self.steps} "
                f"steps and {self.tolerance:g}."
            )


def search(recipe: Recipe, plan: Plan, options: RunOptions, progress: Progress) -> Found:
    """Search; `options.out` holds the cells, one folder a round.

    Raises:
        ConfigError: an optimizer without a rate, a schedule that does not fit a short run. StudyError: no stable rate, or a
            short run that failed for another reason than divergence.
    """
    plan.check()
    short = shortened(recipe, plan.steps)
    assert options.out is not None
    center, trials = float(getattr(short.optimizer, "learning_rate")), list[Trial]()  # noqa: B009
    rates = [center * 4.0**power for power in (-2, -1, 0, 1, 2)]
    number = 0
    while rates:
        number += 1
        chosen = replace(options, scale=SCALE, seeds=None, out=Path(options.out) / f"round-{number}")
        found, compute = _run(short, rates, plan.seeds, chosen, progress)
        short = load_recipe(short, [f"precision={compute['precision']}", f"compile={str(compute['compile']).lower()}"])
        trials += found
        rates = next_rates(trials, center, plan.tolerance)
    bracket = bracket_of(trials, plan.tolerance)
    return Found(bracket, tuple(trials), steps_of(short), steps_of(recipe), plan.seeds, plan.tolerance)


def next_rates(trials: Sequence[Trial], center: float, tolerance: float) -> list[float]:
    """Rates of the next round; none when both sides and the neighbourhood of the best are seen."""
    rates = sorted({trial.rate for trial in trials})
    if any(trial.rate == rates[0] and not trial.stable for trial in trials):
        return [rates[0] / 4, rates[0] / 16] if rates[0] > center / FARTHEST else []
    found = bracket_of(trials, tolerance)
    wider = []
    if found.open_low and found.told_apart and rates[0] > center / FARTHEST:
        wider.append(rates[0] / 4)
    if found.unstable_from is None and rates[-1] < center * FARTHEST:
        top, best = found.rates[-1].mean, min(one.mean for one in found.rates if one.mean is not None)
        if top is not None and top < best + CLEARLY:
            wider.append(rates[-1] * 4)
    if wider:
        return wider
    return _finer(rates, found)


def _finer(rates: Sequence[float], found: Bracket) -> list[float]:
    """Geometric midpoints beside the best rate and inside the edge, while neighbours are more than a factor √2 apart."""
    pairs = [(low, high) for low, high in zip(rates, rates[1:], strict=False) if found.lowest in (low, high)]
    if found.unstable_from is not None:
        pairs.append((found.stable_to, found.unstable_from))
    wide = [(low, high) for low, high in dict.fromkeys(pairs) if high / low > 2**0.5 * 1.01]
    return sorted((low * high) ** 0.5 for low, high in wide)


def _run(
    recipe: Recipe, rates: Sequence[float], seeds: int, options: RunOptions, progress: Progress
) -> tuple[list[Trial], dict[str, Any]]:
    """Trials of one round, and the arithmetic that they used, which later rounds keep."""
    run = StudyRun(RateTrials(recipe, rates), options, progress)
    run.open()
    with run.executor() as executor:
        run.prepare(executor)
        span = f"{min(rates):.3g} to {max(rates):.3g}"
        outcomes = run.run_cells(executor, range(FIRST_SEED, FIRST_SEED + seeds), f"learning rates {span}")
    named = {rate_name(rate): rate for rate in rates}
    trials = []
    for (arm, seed), outcome in outcomes.items():
        if outcome.measurement is None:
            raise StudyError(f"the short run at rate {named[arm]:g}, seed {seed}, failed: {outcome.error}")
        found = outcome.measurement.metrics
        at = found.get("diverged")
        ended = None if at is None else int(at)
        trials.append(Trial(named[arm], seed, found.get("validation_loss"), ended, found.get("first_loss")))
    return trials, run.prepared["compute"]
