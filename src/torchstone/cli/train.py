"""`torchstone train RECIPE`: train one recipe into a run directory, or continue what is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torchstone.train.loop import Callback
    from torchstone.train.run import RunSummary


Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        help="Section whose change since the start is accepted: optimizer, data, or schedule (other rates for steps already "
        "done). Repeatable.",
    ),
]
WatchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--watch",
        help="Analysis whose numbers join the validation record: anisotropy, attention-rank, "
        "head-spectrum, positional-heads or rope-usage (layer-gradients cannot be watched). Takes at most about 1 % "
        "of the training time, beyond one look before the first step and one at the end. Repeatable.",
    ),
]
BranchOption = Annotated[
    str | None,
    typer.Option(
        "--branch",
        help="Go on from a checkpoint of another run in a directory of its own (--out): RUN, RUN@STEP or "
        "RUN/checkpoints/step-00000100. Schedule and budget may differ; steps count from the other run's first.",
    ),
]
Decay = Annotated[
    int | None,
    typer.Option(
        "--decay",
        min=1,
        help="With --branch: end after this many steps, in which the rate falls linearly from its peak to 0.",
    ),
]
Updates = Annotated[
    int | None,
    typer.Option(
        "--updates",
        min=1,
        help="Measure every this many steps how far updates move the weights and what they change; joins the train record.",
    ),
]


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="Recipe (YAML). With --branch it may be left out: the parent's recipe then holds."),
    ] = None,
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
    allow: Allow = None,
    branch: BranchOption = None,
    decay: Decay = None,
    watch: WatchOption = None,
    updates: Updates = None,
) -> None:
    """Train one recipe, with exact resume: the same command continues an interrupted run.

    Several processes train together under torchrun. A signal saves a checkpoint and ends with code 75.

    Example: torchstone train recipes/tiny.yaml budget.steps=200 --out runs/first

    Example: torchstone train --branch runs/plateau@800 --decay 200 --out runs/decay-800
    """
    from torchstone.train.command import asked_run
    from torchstone.train.run import train as run

    loaded, directory = asked_run(
        recipe, overrides or [], out, branch=branch, decay=decay, allow=allow or [], resume=not no_resume
    )
    summary = run(
        loaded,
        directory,
        resume=branch is not None or not no_resume,
        fallback=fallback,
        allow=allow or [],
        callbacks=_callbacks(watch or [], updates),
    )
    if os.environ.get("RANK", "0") == "0":
        _print(summary)


def _callbacks(analyses: list[str], updates: int | None) -> list[Callback]:
    """What --watch and --updates ask for."""
    callbacks: list[Callback] = []
    if analyses:
        from torchstone.diagnose.watch import Watch

        callbacks.append(Watch(analyses))
    if updates is not None:
        from torchstone.diagnose.updates import UpdateWatch

        callbacks.append(UpdateWatch(every=updates))
    return callbacks


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
