"""`torchstone train RECIPE`: train one recipe into a run directory, or continue what is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torchstone.train.loop import Callback
    from torchstone.train.run import RunSummary


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; the same one continues. Default: runs/train-FINGERPRINT."),
    ] = None,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Refuse a directory that holds a run.")] = False,
    fallback: Annotated[
        bool,
        typer.Option("--fallback", help="If the newest checkpoint is damaged, use the newest intact one."),
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", help="Section whose change since the start is accepted: optimizer or data. Repeatable."
        ),
    ] = None,
    watch: Annotated[
        list[str] | None,
        typer.Option(
            "--watch",
            help="Analysis whose numbers join the validation record: anisotropy, attention-rank, "
            "head-spectrum, positional-heads or rope-usage (layer-gradients cannot be watched). Takes at most about 1 % "
            "of the training time, beyond one look before the first step and one at the end. Repeatable.",
        ),
    ] = None,
) -> None:
    """Train one recipe, with exact resume: the same command continues an interrupted run.

    Several processes train together under torchrun. A signal saves a checkpoint and ends with code 75.

    Example: torchstone train recipes/tiny.yaml budget.steps=200 --out runs/first
    """
    from torchstone.recipe.fingerprint import recipe_fingerprint
    from torchstone.recipe.load import load_recipe
    from torchstone.train.run import train as run

    loaded = load_recipe(recipe, overrides or [])
    directory = out or Path("runs") / f"train-{recipe_fingerprint(loaded)[:10]}"
    callbacks = _watching(watch) if watch else []
    summary = run(loaded, directory, resume=not no_resume, fallback=fallback, allow=allow or [], callbacks=callbacks)
    if os.environ.get("RANK", "0") == "0":
        _print(summary)


def _watching(analyses: list[str]) -> list[Callback]:
    from torchstone.diagnose.watch import Watch

    return [Watch(analyses)]


def _print(summary: RunSummary) -> None:
    from torchstone.storage.names import safe_text

    speed = summary.tokens / summary.seconds if summary.seconds else 0.0
    rows = {
        "steps": f"{summary.steps:,}",
        "tokens": f"{summary.tokens:,} ({speed:,.0f} per second)",
        "parameters": f"{summary.parameters:,}",
        "training loss": f"{summary.final['train_loss']:.4f} nats/token",
        "validation loss": f"{summary.final['validation_loss']:.4f} nats/token",
    }
    if "bits_per_byte" in summary.final:
        rows["bits per byte"] = f"{summary.final['bits_per_byte']:.4f}"
    if "accuracy" in summary.final:
        rows["accuracy"] = f"{summary.final['accuracy']:.4f}"
    rows["checkpoint"] = str(summary.checkpoint)
    for name, value in rows.items():
        typer.echo(f"{name:<17}{safe_text(value)}")
    for taint in summary.taints:
        typer.echo(f"warning: {safe_text(taint)}", err=True)
