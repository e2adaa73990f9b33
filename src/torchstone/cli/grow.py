"""`torchstone grow RUN --out DIR`: enlarge the model of a run and leave a run directory that training continues."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torchstone.train.growth import Plan


def grow(
    run: Annotated[Path, typer.Argument(help="Run directory that `torchstone train` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory of the grown run; must not be in use.")],
    factor: Annotated[float | None, typer.Option(help="Tokens (or hidden units) times this. Default: 2.")] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="USE=NUMBER: parameter tokens of one use (input, output, feedforward) or pattern of layer names, in "
            "place of a factor. Repeatable."
        ),
    ] = None,
    widen: Annotated[
        bool, typer.Option("--widen", help="Append hidden units of the feed-forward (mlp, swiglu, geglu) instead.")
    ] = False,
    keys: Annotated[str | None, typer.Option(help="New keys: zero (default; keeps the function) or random.")] = None,
    values: Annotated[str | None, typer.Option(help="New values: random (default) or zero.")] = None,
    tau: Annotated[
        str | None, typer.Option(help="Scale of the scores: fixed (default) or following (the root of the tokens).")
    ] = None,
    freeze_old: Annotated[
        bool,
        typer.Option(
            "--freeze-old",
            help="Keep the old tokens of the layers that grow as they are; the new ones and all other parameters are trained.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random values.")] = 0,
    step: Annotated[int | None, typer.Option(help="Checkpoint of this step; default: the newest.")] = None,
    until: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Step at which the grown run ends, those before growth counted. Default: where the run was to end.",
        ),
    ] = None,
) -> None:
    """Append parameter tokens to a trained run (TokenFormer), or hidden units, keeping what it has learned.

    The grown run's budget is in steps, those of the run before growth included. Train on with:
    torchstone train DIR/recipe.yaml --out DIR, and budget.steps=N for another end.

    Example: torchstone grow runs/small --factor 2 --out runs/grown
    """
    from torchstone.storage.names import safe_text
    from torchstone.train.growth import grow_run

    given = {"tokens": tokens, "keys": keys, "values": values, "tau": tau, "freeze_old": freeze_old or None}
    plan = _plan(widen, factor, {name: value for name, value in given.items() if value is not None}, seed)
    report = grow_run(run, out, plan, step=step, until=until)
    for line in report.lines():
        typer.echo(safe_text(line))
    for line in _next(out):
        typer.echo(safe_text(line))
    if report.warning:
        typer.echo(f"warning: {report.warning}", err=True)


def _next(out: Path) -> list[str]:
    """Where the grown run stands, and the command that trains it on."""
    from torchstone.recipe.load import load_recipe
    from torchstone.train.budget import steps_of
    from torchstone.train.checkpoint import CheckpointStore

    done, planned = CheckpointStore(out / "checkpoints").latest(), steps_of(load_recipe(out / "recipe.yaml"))
    assert done is not None
    left = planned > done
    command = f"torchstone train {out}/recipe.yaml{'' if left else ' budget.steps=N'} --out {out}"
    more = "budget.steps=N sets another end" if left else f"give N above {done}, the budget is spent"
    return [f"{'run':<18}{out}; step {done:,} of {planned:,}", f"{'train on':<18}{command} ({more})"]


def _plan(widen: bool, factor: float | None, given: dict[str, object], seed: int) -> Plan:
    """What the options ask for; raises ConfigError where they exclude each other."""
    from typing import Any

    from torchstone.errors import ConfigError
    from torchstone.train.growth import AppendTokens, AppendUnits

    settings: dict[str, Any] = dict(given)
    if widen:
        if settings:
            raise ConfigError(
                f"--widen appends hidden units, which have no {', '.join(sorted(settings))}; remove these options, or --widen."
            )
        return AppendUnits(factor=2 if factor is None else factor, seed=seed)
    sizes = settings.pop("tokens", None)
    if sizes is not None and factor is not None:
        raise ConfigError("--factor and --tokens both say how many tokens there shall be; give one of them.")
    number: float | dict[str, int] = 2 if factor is None else factor
    return AppendTokens(factor=number if sizes is None else dict(map(_size, sizes)), seed=seed, **settings)


def _size(text: str) -> tuple[str, int]:
    """`feedforward=512` as a pair."""
    from torchstone.errors import ConfigError

    name, _, number = text.rpartition("=")
    if not name or not number.isdecimal():
        raise ConfigError(f"--tokens {text!r} is not of the form USE=NUMBER, such as feedforward=512.")
    return name, int(number)
