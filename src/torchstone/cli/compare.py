"""`torchstone compare RECIPE --arm …`: train matched arms over paired seeds and print a verdict for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchstone.cli.options import Jobs, MaxSeeds, On, Out, UntilDecided, most_seeds
from torchstone.errors import ConfigError

if TYPE_CHECKING:
    from torchstone.lab.training import Matching

Arms = Annotated[list[str] | None, typer.Option("--arm", help="[NAME:]key=value[,key=value…]; repeat for more arms.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides for every arm.")]
Match = Annotated[str, typer.Option(help="What every arm must equal: params, flops or none.")]
Free = Annotated[
    str | None, typer.Option(help="What may change to match: feedforward (default), depth, width or steps.")
]
Tolerance = Annotated[float | None, typer.Option(help="Largest relative residual of a match; default 0.005.")]
Tune = Annotated[bool, typer.Option("--tune", help="Select each arm's peak learning rate on separate seeds.")]
Grid = Annotated[
    str | None,
    typer.Option(help="Rates for --tune, comma-separated; default: five for each arm, from short runs."),
]
Metric = Annotated[str, typer.Option(help="What decides: validation_loss or accuracy.")]
Margin = Annotated[float, typer.Option(help="Smallest advantage worth claiming, in the metric's unit.")]


def compare(
    recipe: Annotated[Path, typer.Argument(help="Baseline recipe (YAML).")],
    overrides: Overrides = None,
    arm: Arms = None,
    seeds: Annotated[int, typer.Option(help="Paired seeds.")] = 3,
    until_decided: UntilDecided = False,
    max_seeds: MaxSeeds = None,
    match: Match = "params",
    free: Free = None,
    tolerance: Tolerance = None,
    tune: Tune = False,
    tune_seeds: Annotated[int | None, typer.Option(help="Seeds for --tune; default 1.")] = None,
    grid: Grid = None,
    metric: Metric = "validation_loss",
    margin: Margin = 0.0,
    on: On = "local",
    jobs: Jobs = None,
    out: Out = None,
) -> None:
    """Train a baseline and its arms, matched and over paired seeds, and judge each arm.

    Example: torchstone compare recipes/tiny.yaml --arm 'v2:model.block.mixer={kind: differential, version: v2}'
    """
    from torchstone.lab.compare import compare as run
    from torchstone.lab.runner import RunOptions
    from torchstone.recipe.load import load_recipe
    from torchstone.report.terminal import print_verdicts

    _refuse_unused(tune, grid=grid, tune_seeds=tune_seeds)
    finished = run(
        load_recipe(recipe, overrides or []),
        arm or [],
        seeds=seeds,
        max_seeds=most_seeds(until_decided, max_seeds),
        match=_matching(match, free, tolerance),
        out=out,
        tune_seeds=(1 if tune_seeds is None else tune_seeds) if tune else 0,
        grid=_rates(grid),
        metric=metric,
        margin=margin,
        options=RunOptions(on=on, jobs=jobs),
    )
    print_verdicts(finished.result, finished.directory)


def _refuse_unused(tune: bool, **options: Any) -> None:
    """Raise for options of --tune where it is not given."""
    if unused := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and not tune]:
        raise ConfigError(f"{unused[0]} is for --tune, which is not given; add it, or drop {unused[0]}.")


def _matching(match: str, free: str | None, tolerance: float | None) -> str | Matching:
    """What arms are matched in; raises ConfigError for settings of a match where nothing is matched."""
    from torchstone.lab.matching import TOLERANCE
    from torchstone.lab.training import Matching

    if match not in ("params", "flops"):
        if free is not None or tolerance is not None:
            unused = "--free" if free is not None else "--tolerance"
            raise ConfigError(
                f"{unused} is for matched arms, and --match is {match}; match params or flops, or drop it."
            )
        return match
    return Matching(match, free or "feedforward", TOLERANCE if tolerance is None else tolerance)  # type: ignore[arg-type]


def _rates(grid: str | None) -> list[float] | None:
    if grid is None:
        return None
    try:
        return [float(rate) for rate in grid.split(",")]
    except ValueError as error:
        raise ConfigError(f"--grid takes comma-separated numbers such as 1e-3,3e-3; given {grid!r}.") from error
