"""Select each arm's peak learning rate on seeds of its own.

An arm that looks better only because the shared rate suits it is the commonest false result in comparisons. Tuning
trains every arm at every rate of a declared grid, on seeds that the comparison never uses, and takes the rate with the
best mean of the metric (ties: the lower rate). Every arm gets the same number of tuning runs.

A grid that is given is that of every arm. Without one, short runs find a bracket for each arm (`torchstone.lab.rates`), and the
arm's grid has five rates in equal ratios from a quarter of the bracket's lower end, since long runs want lower rates than short
ones, to its upper end. Neighbours are at most a factor 2.5 apart: around a wider bracket the grid is centred at half the best
rate.

Pitfall: a best rate at the edge of the grid means that the grid was too narrow; the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchstone.errors import StudyError
from torchstone.lab.progress import Progress
from torchstone.lab.rates.bracket import Bracket
from torchstone.lab.rates.search import Plan, search
from torchstone.lab.record import Outcome
from torchstone.lab.runner import RunOptions, StudyRun
from torchstone.lab.study import Arm, Cell, Measurement, Resources, Scale, Study
from torchstone.lab.training import TrainingStudy, Tuned
from torchstone.recipe.load import load_recipe
from torchstone.report.result import Metric, Table

FIRST_TUNING_SEED = 1_000_000
TUNED_RATES, WIDEST = 5, 2.5
Grids = Mapping[str, Sequence[float]]  # arm → rates


class RateSearch(Study):
    """The tuning cells of a training study, as a study without claims."""

    claims = ()

    def __init__(self, study: TrainingStudy, scale: Scale, grids: Grids) -> None:
        self.title = f"Learning rates: {study.title}"
        self.question = ""
        self.metrics = study.metrics
        self.scales = {"tuning": scale}
        self.inner, self.grids = study, {arm: tuple(rates) for arm, rates in grids.items()}
        self.baseline = tuning_name(study.baseline, self.grids[study.baseline][0])

    def arms(self, scale: Scale) -> Sequence[Arm]:
        """Every arm at every rate."""
        return [at_rate(arm, rate) for arm in self.inner.arms(scale) for rate in self.grids[arm.name]]

    def prepare(self, arms: Sequence[Arm], settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """The worker prepares the inner study (see `reference`)."""
        return self.inner.prepare(arms, settings, directory)

    def measure(self, cell: Cell) -> Measurement:
        """The worker measures the inner study (see `reference`)."""
        return self.inner.measure(cell)

    def reference(self) -> dict[str, Any]:
        """The inner study: a tuning cell is an ordinary cell with another rate and seed."""
        return self.inner.reference()

    def identity(self) -> dict[str, Any]:
        """The inner study's, and the grids."""
        return {**self.inner.identity(), "grids": {arm: list(rates) for arm, rates in self.grids.items()}}

    def resources(self, arms: Sequence[Arm]) -> Resources:
        """The inner study's."""
        return self.inner.resources(arms)


def tuning_name(arm: str, rate: float) -> str:
    """Name of a tuning arm."""
    return f"{arm}.rate-{rate:.6g}"


def at_rate(arm: Arm, rate: float) -> Arm:
    """The arm with another peak learning rate."""
    recipe = load_recipe(arm.settings["recipe"], [f"optimizer.learning_rate={rate!r}"])
    return replace(arm, name=tuning_name(arm.name, rate), settings={**arm.settings, "recipe": recipe.data_dict()})


def tune(
    study: TrainingStudy,
    scale: Scale,
    grids: Grids,
    seeds: int,
    metric: Metric,
    options: RunOptions,
    progress: Progress,
) -> Tuned:
    """Run the tuning cells in `options.out`/tuning and select each arm's rate from its grid.

    Raises:
        StudyError: an arm has no rate at which every tuning seed finished.
    """
    search = RateSearch(study, scale, grids)
    assert options.out is not None
    run = StudyRun(search, replace(options, scale="tuning", out=Path(options.out) / "tuning"), progress)
    run.open()
    with run.executor() as executor:
        run.prepare(executor)
        tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
        outcomes = run.run_cells(executor, tuning_seeds, "tuning learning rates")
    return replace(select(grids, outcomes, metric), seeds=seeds)


def bracketed(
    study: TrainingStudy, scale: Scale, options: RunOptions, progress: Progress, plan: Plan
) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """A grid for each arm from short runs in `options.out`/brackets/ARM, and notes on arms whose short runs could not tell
    rates apart; raises what `search` raises."""
    grids, notes = {}, []
    for arm in study.arms(scale):
        folder = Path(str(options.out)) / "brackets" / arm.name
        found = search(load_recipe(arm.settings["recipe"]), plan, replace(options, out=folder), progress).bracket
        grids[arm.name] = grid_of(found)
        if not found.told_apart:
            notes.append(
                f"Arm {arm.name}: the short runs behind its rates learned too little to tell rates apart; give --grid, or a "
                "longer budget."
            )
    return grids, tuple(notes)


def grid_of(found: Bracket) -> tuple[float, ...]:
    """`TUNED_RATES` rates in equal ratios around a bracket, none above the highest stable one, of six digits."""
    low, last = found.low / 4, TUNED_RATES - 1
    ratio = (found.high / low) ** (1 / last)
    if ratio > WIDEST:
        ratio = WIDEST
        low = min(found.best_rate / 2 / ratio ** (last / 2), found.stable_to / ratio**last)
    return tuple(float(f"{low * ratio**power:.6g}") for power in range(TUNED_RATES))


def select(grids: Grids, outcomes: Mapping[tuple[str, int], Outcome], metric: Metric) -> Tuned:
    """The rate with the best mean metric for each arm (ties: the lower rate), among rates at which every seed finished."""
    rates: dict[str, float] = {}
    notes, rows = [_described(grids)], []
    for arm, grid in grids.items():
        means = {rate: _mean(arm, rate, outcomes, metric) for rate in grid}
        usable = {rate: mean for rate, mean in means.items() if mean is not None}
        if not usable:
            raise StudyError(
                f"arm {arm!r} failed at every learning rate of the grid; see the cells' errors, or lower the grid."
            )
        sign = -1 if metric.better == "higher" else 1
        rates[arm] = min(usable, key=lambda rate: (sign * usable[rate], rate))
        if rates[arm] in (min(grid), max(grid)):
            notes.append(
                f"Arm {arm}: the best rate {rates[arm]:g} lies at the edge of the grid; a wider one may do better."
            )
        rows += [(arm, rate, mean, "selected" if rate == rates[arm] else "") for rate, mean in means.items()]
    columns = ("arm", "peak learning rate", f"mean {metric.label}", "")
    title = f"Tuning: mean {metric.label} by peak learning rate"
    return Tuned(rates, tuple(notes), Table(title=title, columns=columns, rows=tuple(rows)))


def _mean(arm: str, rate: float, outcomes: Mapping[tuple[str, int], Outcome], metric: Metric) -> float | None:
    """Over the tuning seeds; None unless all of them finished."""
    cells = [outcome.measurement for (name, _), outcome in outcomes.items() if name == tuning_name(arm, rate)]
    finished = [cell.metrics[metric.name] for cell in cells if cell is not None]
    return sum(finished) / len(finished) if finished and len(finished) == len(cells) else None


def _described(grids: Grids) -> str:
    first = next(iter(grids.values()))
    if all(tuple(grid) == tuple(first) for grid in grids.values()):
        listed = ", ".join(f"{rate:g}" for rate in first)
        return f"The peak learning rate was selected for each arm on separate seeds from the grid {listed}."
    return (
        f"The peak learning rate was selected for each arm on separate seeds from {len(first)} rates of its own, around "
        "the bracket that short runs of the arm found."
    )
