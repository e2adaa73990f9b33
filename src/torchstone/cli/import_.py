"""`torchstone import SOURCE DIR`: make a run directory of a Hugging Face checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Convention(StrEnum):
    """What a window of W means."""

    inclusive = "inclusive"
    plus_one = "plus-one"


def import_(
    source: Annotated[
        str, typer.Argument(help="Folder of a Hugging Face checkpoint, or the id of a model on the hub.")
    ],
    directory: Annotated[Path, typer.Argument(help="Run directory to make; it must not exist.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides of the recipe, for all but the model.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Accept a folder that brings code, as the standard model of its type. The code is not run.",
        ),
    ] = False,
    window_convention: Annotated[
        Convention | None,
        typer.Option(
            help="What RecurrentGemma's window of W sees: W keys, as in transformers (inclusive), or W + 1, as in its authors' "
            "code (plus-one, the default)."
        ),
    ] = None,
) -> None:
    """Make a run directory of a checkpoint: Llama, Mistral, Qwen2, Qwen3, RecurrentGemma or JetMoE.

    The run stands at step 0; generate, diagnose, eval and train take it. Its data section tokenises text with the
    checkpoint's tokenizer; override it to train on your own.

    Example: torchstone import models/SmolLM2-135M runs/smol data.length=512
    """
    from torchstone.interop.importing import import_checkpoint
    from torchstone.storage.names import safe_text

    done = import_checkpoint(
        source,
        directory,
        overrides or [],
        revision=revision,
        trust_remote_code=trust_remote_code,
        window_convention=None if window_convention is None else window_convention.value,
    )
    folder = safe_text(str(done.directory))
    typer.echo(f"{'run':<12}{folder}")
    typer.echo(f"{'type':<12}{done.model_type}")
    typer.echo(f"{'parameters':<12}{done.parameters:,}")
    typer.echo("\nUse it like any run:")
    typer.echo(f"  torchstone generate {folder} --prompt 'Once upon a time'")
    typer.echo(f"  torchstone train {folder}/recipe.yaml --out {folder}")
