"""Compare arms with a baseline: a recipe, interventions as overrides, matched sizes, paired seeds, a verdict for each.

    import torchstone
    finished = torchstone.compare("recipes/tiny.yaml", ["v2:model.block.mixer={kind: differential, version: v2}"], seeds=3)

Every arm carries one claim, fixed before the run: its metric is lower (or higher) than the baseline's by more than the
margin. The default metric is the held-out loss at the end of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError
from torchstone.lab.comparison import BASELINE, METRICS, SCALE, Comparison
from torchstone.lab.progress import Progress, choose_progress
from torchstone.lab.rates.search import Plan
from torchstone.lab.runner import Finished, RunOptions, StudyRun, run_study
from torchstone.lab.training import Matching, Variant, require_grid
from torchstone.lab.tuning import bracketed, tune
from torchstone.recipe.arms import parse_arm
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe


def _variants(arms: Sequence[str] | Mapping[str, Sequence[str]]) -> list[Variant]:
    if isinstance(arms, Mapping):
        parsed = [(name, list(overrides)) for name, overrides in arms.items()]
    else:
        parsed = [parse_arm(arm) for arm in arms]
    if not parsed:
        raise ConfigError("a comparison needs at least one arm, for example --arm model.block.mixer=differential.")
    if any(name == BASELINE for name, _ in parsed):
        raise ConfigError(f"an arm cannot be named {BASELINE!r}: that is the recipe as given. Use NAME:key=value.")
    for name, overrides in parsed:
        if any(override.split("=")[0].strip() in ("seed", "sinks", "checkpoint") for override in overrides):
            raise ConfigError(
                f"arm {name!r} sets the seed, sinks or checkpoints, which belong to the comparison; use --seeds."
            )
    return [Variant(name, tuple(overrides)) for name, overrides in parsed]


def _matching(match: str | Matching) -> Matching | None:
    if isinstance(match, Matching):
        return match
    if match not in ("params", "flops", "none"):
        raise ConfigError(f"cannot match {match!r}; allowed: params, flops, none.")
    return None if match == "none" else Matching(match)  # type: ignore[arg-type]


def compare(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    arms: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    seeds: int = 3,
    max_seeds: int | None = None,
    match: str | Matching = "params",
    out: str | Path | None = None,
    tune_seeds: int = 0,
    grid: Sequence[float] | None = None,
    metric: str = "validation_loss",
    margin: float = 0.0,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> Finished:
    """Train a baseline and its arms over paired seeds and judge one claim per arm.

    Args:
        recipe: the baseline: a YAML file, plain data or a Recipe.
        arms: `[NAME:]key=value[,key=value…]` strings, or name → overrides.
        seeds: paired seeds; with `max_seeds`, the number at the first look of the sequential rule.
        max_seeds: if given, seeds are added up to this number until every claim is decided.
        match: what every arm must equal: `params`, `flops`, `none`, or a Matching with the free dimension and tolerance.
        out: directory; None makes `runs/compare-<fingerprint>`. The same directory continues.
        tune_seeds: seeds for selecting each arm's learning rate; 0 shares the recipe's rate.
        grid: peak learning rates to select from, the same for all arms; None finds a bracket for each arm with short runs and
            takes five rates around it.
        metric: what decides (`validation_loss`, or `accuracy` on a task with exact answers).
        margin: the smallest advantage worth claiming, ≥ 0, in the metric's unit.
        options: executor and jobs.
        progress: where progress is shown; None chooses by the terminal.

    Returns:
        the result and the directory that holds it as `result.json`, `report.html` and `report.md`.

    Raises:
        ConfigError, BudgetError: unusable recipe, arm, metric or match. StudyError: directory of another comparison.
    """
    if metric not in METRICS:
        raise ConfigError(f"cannot compare by {metric!r}; allowed: {', '.join(METRICS)}.")
    if margin < 0 or seeds < 1 or tune_seeds < 0:
        raise ConfigError(f"seeds must be ≥ 1, tune seeds and margin ≥ 0; given {seeds}, {tune_seeds}, {margin:g}.")
    base = load_recipe(recipe)
    chosen = replace(options or RunOptions(), scale=SCALE, seeds=seeds, max_seeds=max_seeds, out=out)
    study = Comparison(base, _variants(arms), _matching(match), metric, margin, seeds)
    shown = progress or choose_progress()
    try:
        if tune_seeds:
            study, chosen = _tuned(study, chosen, grid, tune_seeds, shown)
        return run_study(study, chosen, shown)
    finally:
        shown.close()


def _tuned(
    study: Comparison, options: RunOptions, grid: Sequence[float] | None, tune_seeds: int, progress: Progress
) -> tuple[Comparison, RunOptions]:
    """The comparison with each arm's own rate, and the directory that holds both stages."""
    rate = getattr(study.recipe.optimizer, "learning_rate", None)
    if rate is None:
        raise ConfigError(f"optimizer {study.recipe.optimizer.kind!r} has no learning_rate to tune.")
    given = None if grid is None else require_grid(grid)
    if options.out is None:
        options = replace(options, out=StudyRun(study, options, progress).out.with_suffix(".tuned"))
    metric = study.metrics[0]
    scale = study.scales[SCALE]
    if given is None:
        grids, notes = bracketed(study, scale, options, progress, Plan(seeds=tune_seeds))
    else:
        grids, notes = dict.fromkeys([arm.name for arm in study.arms(scale)], given), ()
    found = tune(study, scale, grids, tune_seeds, metric, options, progress)
    tuned = replace(found, grid=given or (), notes=(*found.notes, *notes))
    return Comparison(
        study.recipe, study.arms_given, study.matching, metric.name, study.margin, study.seeds, tuned
    ), options
