"""`torchstone infill RUN --prefix TEXT --goal TEXT`: write what comes between two texts, with a belief-state run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def infill(
    run: Annotated[Path, typer.Argument(help="Run directory of a belief-state model, from `torchstone train`.")],
    prefix: Annotated[str, typer.Option(help="Text before the gap; empty: the start of a document.")] = "",
    goal: Annotated[str, typer.Option(help="Text behind the gap; empty: the end of the document.")] = "",
    backward: Annotated[bool, typer.Option("--backward", help="Write the gap from its end to its start.")] = False,
    max_new: Annotated[int, typer.Option(help="Most tokens of the gap.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1: closer to the most likely tokens. Default: 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens that hold this probability.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    step: Annotated[int | None, typer.Option(help="Checkpoint of this step; default: the newest.")] = None,
) -> None:
    """Write the text between a prefix and a goal: the gap alone goes to standard output.

    Example: torchstone infill runs/bst --prefix 'def area(r):' --goal 'return result' --greedy
    """
    from torchstone.errors import ConfigError
    from torchstone.models import belief_generate
    from torchstone.storage.names import safe_text
    from torchstone.train.run import load_run

    _, model, data = load_run(run, step)
    belief_generate.require_belief_state(model)
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            "this run was trained on synthetic tokens, not on text, so it has no tokenizer; give a run whose data is text."
        )
    if tokenizer.end_of_document != model.end_token:
        raise ConfigError(
            f"the run's end_token is {model.end_token}, but its tokenizer ends documents with {tokenizer.end_of_document}; "
            "train with model.end_token set to that id."
        )
    before = tokenizer.encode(prefix) or [model.end_token]
    behind = [*tokenizer.encode(goal), model.end_token]
    if temperature is None:
        temperature = 1.0 if greedy else 0.8
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "greedy": greedy}
    write = belief_generate.prepend if backward else belief_generate.infill
    completion = write(model, [before], [behind], max_new=max_new, seed=seed, **settings)[0]
    typer.echo(safe_text(tokenizer.decode(completion.tokens)))
