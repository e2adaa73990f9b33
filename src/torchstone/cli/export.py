"""`torchstone export RUN DIR`: write a run's model as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torchstone.interop.exporting import Export


def export(
    run: Annotated[Path, typer.Argument(help="Run directory that `torchstone train` wrote.")],
    directory: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint of this step; default: the newest.")] = None,
) -> None:
    """Write a run's model and tokenizer as a folder that transformers loads.

    A plain decoder becomes a Llama, Mistral, Qwen2 or Qwen3 checkpoint. Any other model keeps torchstone's own form, which
    transformers loads after `import torchstone.interop.huggingface`.

    Example: torchstone export runs/first exported
    """
    from torchstone.interop.exporting import export_run

    _print(export_run(run, directory, step))


def _print(done: Export) -> None:
    from torchstone.interop.exporting import OWN_TYPE
    from torchstone.storage.names import safe_text

    own = done.model_type == OWN_TYPE
    folder = safe_text(str(done.directory))
    rows = {
        "folder": folder,
        "files": ", ".join(done.files),
        "type": f"{done.model_type} ({safe_text(done.reason)})" if own else done.model_type,
        "parameters": f"{done.parameters:,}",
    }
    if "tokenizer.json" not in done.files:
        rows["tokenizer"] = "none: the run was trained on synthetic tokens"
    for name, value in rows.items():
        typer.echo(f"{name:<12}{value}")
    typer.echo("\nLoad it with:")
    if own:
        typer.echo('  import torchstone.interop.huggingface  # knows the type "torchstone"')
    typer.echo("  from transformers import AutoModelForCausalLM, AutoTokenizer")
    typer.echo(f"  model = AutoModelForCausalLM.from_pretrained({str(done.directory)!r})")
    if "tokenizer.json" in done.files:
        typer.echo(f"  tokenizer = AutoTokenizer.from_pretrained({str(done.directory)!r})")
