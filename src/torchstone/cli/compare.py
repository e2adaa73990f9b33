"""`torchstone compare RECIPE --arm …`: train matched arms over paired seeds and print a verdict for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchstone.cli.options import Jobs, MaxSeeds, On, Out, UntilDecided, most_seeds
from torchstone.errors import ConfigError

Arms = Annotated[list[str] | None, typer.Option("--arm", help="[NAME:]key=value[,key=value…]; repeat for more arms.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides for every arm.")]
Match = Annotated[str, typer.Option(help="What every arm must equal: params, flops or none.")]
Free = Annotated[str, typer.Option(help="What may change to match: feedforward, depth, width or steps.")]
Tolerance = Annotated[float, typer.Option(help="Largest relative residual of a match.")]
Tune = Annotated[bool, typer.Option("--tune", help="Select each arm's peak learning rate on separate seeds.")]
Grid = Annotated[
    str | None, typer.Option(help="Rates for --tune, comma-separated; default 1/4 to 4 times the recipe's.")
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
    free: Free = "feedforward",
    tolerance: Tolerance = 0.005,
    tune: Tune = False,
    tune_seeds: Annotated[int, typer.Option(help="Seeds for --tune.")] = 1,
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
    from torchstone.lab.training import Matching
    from torchstone.recipe.load import load_recipe
    from torchstone.report.terminal import print_verdicts

    if not tune and grid is not None:
        raise ConfigError("--grid is for --tune, which is not given; add it, or drop the grid.")
    finished = run(
        load_recipe(recipe, overrides or []),
        arm or [],
        seeds=seeds,
        max_seeds=most_seeds(until_decided, max_seeds),
        match=Matching(match, free, tolerance) if match in ("params", "flops") else match,  # type: ignore[arg-type]
        out=out,
        tune_seeds=tune_seeds if tune else 0,
        grid=_rates(grid),
        metric=metric,
        margin=margin,
        options=RunOptions(on=on, jobs=jobs),
    )
    print_verdicts(finished.result, finished.directory)


def _rates(grid: str | None) -> list[float] | None:
    if grid is None:
        return None
    try:
        return [float(rate) for rate in grid.split(",")]
    except ValueError as error:
        raise ConfigError(f"--grid takes comma-separated numbers such as 1e-3,3e-3; given {grid!r}.") from error
