"""`torchstone.learning_rates`: search, and write what was found as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchstone.lab.environment import environment
from torchstone.lab.progress import Progress, choose_progress
from torchstone.lab.rates.finding import finding_of
from torchstone.lab.rates.search import Found, Plan, search
from torchstone.lab.runner import RunOptions
from torchstone.recipe.fingerprint import device_class, recipe_fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.report.finding_write import write
from torchstone.report.stamp import stamped
from torchstone.storage.atomic import atomic_write
from torchstone.storage.hashing import fingerprint_of


def learning_rates(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    seeds: int = 3,
    tolerance: float = 0.02,
    out: str | Path | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> tuple[Found, Path]:
    """Find the stability edge, the best rate and a bracket of good rates for a recipe.

    Args:
        recipe: a YAML file, plain data or a Recipe, with any model and optimizer.
        overrides: `key=value` lines on it.
        steps: updates of a short run; None takes a tenth of the recipe's, at least 100.
        seeds: paired seeds at every rate.
        tolerance: nats above the lowest mean loss that a rate of the bracket may have.
        out: directory; None makes `runs/lr-<fingerprint>`. The same directory continues.
        options: executor and jobs.
        progress: where progress is shown; None chooses by the terminal.

    Returns:
        what was found, and the page `report.html` that shows it, beside the recipe that its command reads.

    Raises:
        ConfigError, BudgetError: unusable recipe or settings. StudyError: no rate at which every seed is stable.
    """
    loaded, plan = load_recipe(recipe, list(overrides)), Plan(steps, seeds, tolerance)
    name = fingerprint_of([recipe_fingerprint(loaded), steps, seeds])[:10]
    directory = Path(out) if out else Path("runs") / f"lr-{name}"
    shown = progress or choose_progress()
    try:
        found = search(loaded, plan, replace(options or RunOptions(), out=directory), shown)
    finally:
        shown.close()
    atomic_write(directory / "recipe.yaml", dump_yaml(loaded))
    words = ["torchstone", "lr", "recipe.yaml", "--steps", str(found.steps), "--seeds", str(seeds)]
    words += ["--tolerance", f"{tolerance:g}"]
    finding = stamped(finding_of(found, loaded), words, environment(device_class()))
    return found, write(finding, directory)
