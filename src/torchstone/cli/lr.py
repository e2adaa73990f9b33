"""`torchstone lr RECIPE`: find the learning rates at which a recipe trains well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchstone.cli.options import Jobs, On


def lr(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Updates of a short run; default: a tenth of the recipe's, at least 100.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Paired seeds at every rate.")] = 3,
    tolerance: Annotated[
        float, typer.Option(help="Nats above the lowest mean loss that a recommended rate may have.")
    ] = 0.02,
    on: On = "local",
    jobs: Jobs = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory; the same one continues. Default: runs/lr-FINGERPRINT.")
    ] = None,
) -> None:
    """Find a bracket of good learning rates and the edge of stability with short paired runs.

    Runs that diverge are ended early. Works for every optimizer and mixer.

    Example: torchstone lr recipes/tiny.yaml optimizer=lionar --seeds 3
    """
    from torchstone.lab.rates.find import learning_rates
    from torchstone.lab.rates.finding import sentences
    from torchstone.lab.runner import RunOptions

    found, page = learning_rates(
        recipe,
        overrides or (),
        steps=steps,
        seeds=seeds,
        tolerance=tolerance,
        out=out,
        options=RunOptions(on=on, jobs=jobs),
    )
    for one in found.bracket.rates:
        mean = f"{one.mean:.4f}" if one.mean is not None else f"diverged ({len(one.diverged)} of {found.seeds} seeds)"
        typer.echo(f"{one.rate:<12.4g}{mean}")
    for sentence in sentences(found):
        typer.echo(sentence)
    typer.echo(str(page))
