"""`torchstone recipe show|check|kinds`: what a recipe means, what it costs, and what may stand in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchstone.kinds import KINDS

if TYPE_CHECKING:
    from torchstone.models.counts import Counts
    from torchstone.recipe.schema import Recipe

recipe = typer.Typer(no_args_is_help=True, help="Show or check a recipe; list the kinds that a recipe may use.")

RecipeFile = Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides.", metavar="KEY=VALUE")]


@recipe.command("show")
def show(file: RecipeFile, overrides: Overrides = None) -> None:
    """Print the resolved recipe, then as comments its size, memory and cost. The output is itself a recipe.

    Example: torchstone recipe show recipes/tiny.yaml model.block.mixer=differential budget.steps=100
    """
    from torchstone.recipe.load import load_recipe
    from torchstone.recipe.yaml import dump_yaml

    loaded = load_recipe(file, overrides or [])
    typer.echo(dump_yaml(loaded))
    for name, value in cost(loaded).items():
        typer.echo(f"# {name:<32}{value}")


@recipe.command("check")
def check(file: RecipeFile, overrides: Overrides = None) -> None:
    """Check a recipe without training: every key, every kind, that the model can be built, its decay, and its stages."""
    from torchstone.recipe.load import load_recipe
    from torchstone.train.budget import counts_of, groups_of, phases_of

    loaded = load_recipe(file, overrides or [])
    parameters = counts_of(loaded).parameters
    phases_of(loaded)  # the schedule's stages fit the run
    groups_of(loaded)  # every parameter has its decay
    typer.echo(f"{file} is a valid recipe: {loaded.model.kind}, {human(parameters)} parameters, {_budget(loaded)}.")


@recipe.command("kinds")
def kinds(
    family: Annotated[str | None, typer.Argument(help="Family, or a place such as model.block.mixer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the kinds of a family with every setting, its type, default and meaning; alone, list the families.

    Example: torchstone recipe kinds mixer
    """
    from torchstone.recipe.catalogue import catalogue, family_named, places, render
    from torchstone.recipe.registry import kinds as names

    if as_json:
        found = catalogue([family_named(family)] if family is not None else list(KINDS))
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    if family is None:
        for name in KINDS:
            typer.echo(f"{name:<16}{', '.join(names(name))}")
        typer.echo("\n`torchstone recipe kinds FAMILY` shows the settings of each kind.")
        return
    chosen = family_named(family)
    typer.echo(render(catalogue([chosen])))
    place = (places(chosen) or [chosen])[0]
    typer.echo(
        f"\nThese stand in a recipe at: {', '.join(places(chosen))}.\n"
        f"On the command line: {place}={names(chosen)[-1]}, and {place}.SETTING=VALUE for one setting."
    )


def cost(loaded: Recipe) -> dict[str, str]:
    """Size, memory and total cost of a recipe as text, by name."""
    from torchstone.train.budget import counts_of, groups_of, steps_of, tokens_per_step

    counts, steps = counts_of(loaded), steps_of(loaded)
    decay = {
        f"optimizer group {group['group']}": f"weight decay {group['weight_decay']:g} on {group['parameters']:,} values "
        f"(tensors: {len(group['names'])})"
        for group in groups_of(loaded)
    }
    tokens = steps * tokens_per_step(loaded)
    active = f", {counts.active_parameters:,} used by a token" if counts.active_parameters < counts.parameters else ""
    return {
        "parameters": f"{counts.parameters:,} ({counts.non_embedding:,} without embeddings{active})",
        "forward FLOPs per token": human(counts.forward_flops_per_token),
        "training FLOPs per token": human(counts.training_flops_per_token),
        "decoding state": f"{counts.kv_cache_bytes_per_token * counts.length:,.0f} bytes for {counts.length} tokens in bf16",
        "memory for training": _memory(loaded, counts),
        **decay,
        "steps": f"{steps:,}",
        "tokens": f"{tokens:,} ({tokens / max(counts.non_embedding, 1):.3g} per non-embedding parameter)",
        "training FLOPs": human(counts.training_flops_per_token * tokens),
    }


def _memory(loaded: Recipe, counts: Counts) -> str:
    """Estimated memory of one process, for the recipe's precision or for both that `auto` may choose."""
    import torch

    from torchstone.models.counts import OPTIMIZER_VALUES, Precision, memory_estimate
    from torchstone.objectives.next_token import chunk_size
    from torchstone.recipe.fingerprint import device_class

    optimizer = loaded.optimizer.kind
    if optimizer not in OPTIMIZER_VALUES:
        return f"no estimate for optimizer {optimizer}"
    rows = loaded.batch.micro or loaded.batch.sequences
    output_vd = torch.empty(counts.vocab_size, counts.width, device="meta")
    chunk = getattr(loaded.objective, "chunk", None) or max(1, chunk_size(output_vd) // counts.components)
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if loaded.precision == "auto" else (loaded.precision,)
    parts = []
    for precision in precisions:
        found = memory_estimate(counts, rows, precision, optimizer, chunk, device_class())
        weights = found.parameters + found.gradients + found.optimizer
        parts.append(
            f"{_mebibytes(found.total)} MiB in {precision} (weights, gradients and optimizer "
            f"{_mebibytes(weights)}, activations {_mebibytes(found.activations)}, "
            f"logits {_mebibytes(found.logits)})"
        )
    return "about " + ", or ".join(parts)


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:,.0f}"


def human(number: float) -> str:
    """`1.23M` for 1 230 000."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _budget(loaded: Recipe) -> str:
    budget: Any = loaded.budget
    return f"{getattr(budget, budget.unit):g} {budget.unit.replace('_', ' ')}"
