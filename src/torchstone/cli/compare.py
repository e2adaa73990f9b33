"""`torchstone compare RECIPE --arm …`: train matched arms over paired seeds and print a verdict for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchstone.errors import ConfigError


def compare(
    recipe: Annotated[Path, typer.Argument(help="Baseline recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides for every arm.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", help="[NAME:]key=value[,key=value…]; repeat for more arms.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Paired seeds.")] = 3,
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="Add seeds under a group-sequential rule.")
    ] = False,
    max_seeds: Annotated[int, typer.Option(help="Most seeds that --until-decided may use.")] = 12,
    match: Annotated[str, typer.Option(help="What every arm must equal: params, flops or none.")] = "params",
    free: Annotated[
        str, typer.Option(help="What may change to match: feedforward, depth, width or steps.")
    ] = "feedforward",
    tolerance: Annotated[float, typer.Option(help="Largest relative residual of a match.")] = 0.005,
    tune: Annotated[
        bool, typer.Option("--tune", help="Select each arm's peak learning rate on separate seeds.")
    ] = False,
    tune_seeds: Annotated[int, typer.Option(help="Seeds for --tune.")] = 1,
    grid: Annotated[
        str | None,
        typer.Option(help="Rates for --tune, comma-separated; default 1/4 to 4 times the recipe's."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="What decides: validation_loss or accuracy.")
    ] = "validation_loss",
    margin: Annotated[
        float, typer.Option(help="Smallest advantage worth claiming, in the metric's unit.")
    ] = 0.0,
    on: Annotated[
        str, typer.Option(help="Where cells run: local, inline, ray or ray://HOST:PORT.")
    ] = "local",
    jobs: Annotated[
        int | None, typer.Option(help="Cells at a time; default: chosen from cores and model size.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory; the same one continues. Default: runs/compare-FINGERPRINT."),
    ] = None,
) -> None:
    """Train a baseline and its arms, matched and over paired seeds, and judge each arm.

    Example: torchstone compare recipes/tiny.yaml --arm v2:model.block.mixer.kind=differential,model.block.mixer.version=v2
    """
    from torchstone.lab.compare import compare as run
    from torchstone.lab.runner import RunOptions
    from torchstone.lab.training import Matching
    from torchstone.recipe.load import load_recipe
    from torchstone.report.terminal import print_verdicts

    if match not in ("params", "flops", "none"):
        raise ConfigError(f"cannot match {match!r}; --match takes params, flops or none.")
    matching = "none" if match == "none" else Matching(match, free, tolerance)  # type: ignore[arg-type]
    finished = run(
        load_recipe(recipe, overrides or []),
        arm or [],
        seeds=seeds,
        max_seeds=max_seeds if until_decided else None,
        match=matching,
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
        raise ConfigError(
            f"--grid takes comma-separated numbers such as 1e-3,3e-3; given {grid!r}."
        ) from error
