"""`torchstone generate RUN --prompt TEXT`: continue a text with the model of a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torchstone.data.tokenizer import Tokenizer


def generate(
    run: Annotated[Path, typer.Argument(help="Run directory that `torchstone train` wrote.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1: closer to the most likely tokens. Default: 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens that hold this probability.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the completion; it is not printed. Repeatable.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of this step; default: the newest.")] = None,
) -> None:
    """Write text with a trained run: the completion alone goes to standard output.

    Example: torchstone generate runs/first --prompt 'def main' --greedy
    """
    from torchstone.models.generate import generate as complete
    from torchstone.storage.names import safe_text
    from torchstone.train.run import load_run

    _, model, data = load_run(run, step)
    tokenizer = _tokenizer(data)
    ends = [[tokenizer.end_of_document], *(tokenizer.encode(text) for text in stop or [])]
    # a model has seen every text after the end of another one, so an empty prompt is that end
    start = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    if temperature is None:
        temperature = 1.0 if greedy else 0.8
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "greedy": greedy}
    completion = complete(model, [start], max_new=max_new, stop=ends, seed=seed, **settings)[0]
    typer.echo(safe_text(_until(tokenizer.decode(completion.tokens), stop or [])))


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop; a stop may have been made of other tokens than its own encoding."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _tokenizer(data: Any) -> Tokenizer:
    from torchstone.errors import ConfigError

    tokenizer: Tokenizer | None = getattr(data, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            "this run was trained on synthetic tokens, not on text, so it has no tokenizer and cannot continue a "
            "prompt. Generate from a run whose data is `text`."
        )
    return tokenizer
