"""`torchstone generate RUN --prompt TEXT`: continue one text, or many, with the model of a run directory.

Many prompts share one continuous batch: each enters as soon as a row is free and receives what it would alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torchstone.data.tokenizer import Tokenizer
    from torchstone.models.continuous import Batcher, Completion, Request

ROWS = 8
EVERY_TERMINAL, EVERY_PLAIN = 0.2, 5.0  # seconds between two progress lines


def generate(
    run: Annotated[Path, typer.Argument(help="Run directory that `torchstone train` wrote.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. Repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts: one a line, or .jsonl with `prompt` in each line."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write completions here, as JSON lines in the order of the prompts.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Most prompts that are continued at the same time.")] = ROWS,
    prefill: Annotated[int, typer.Option(help="Most prompt tokens that are read between two tokens of a row.")] = 512,
    max_new: Annotated[int, typer.Option(help="Most tokens to generate per prompt.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1: closer to the most likely tokens. Default: 0.8.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens that hold this probability.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the draws; each prompt has a stream of its own by its number.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion; it is not printed. Repeatable.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of this step; default: the newest.")] = None,
) -> None:
    """Write text with a trained run.

    One prompt: its completion alone goes to standard output. Several: a JSON line for each, in their order.

    Example: torchstone generate runs/first --prompt 'def main' --greedy
    """
    from torchstone.models.continuous import Batcher, Request
    from torchstone.models.sampling import Sampling
    from torchstone.train.run import load_run

    texts = _texts(prompt or [], prompts)
    _, model, data = load_run(run, step)
    tokenizer = _tokenizer(data)
    ends = [[tokenizer.end_of_document], *(tokenizer.encode(text) for text in stop or [])]
    sampling = Sampling((1.0 if greedy else 0.8) if temperature is None else temperature, top_k, top_p, greedy)
    batcher = Batcher(model, rows, prefill=prefill)
    requests = [
        # a model has seen every text after the end of another one, so an empty prompt is that end
        Request(
            tokenizer.encode(text) or [tokenizer.end_of_document], max_new, sampling, ends, seed, f"generate row {n}"
        )
        for n, text in enumerate(texts)
    ]
    completions = _complete(batcher, requests)
    lines = [
        _line(text, completion, tokenizer, stop or []) for text, completion in zip(texts, completions, strict=True)
    ]
    _write(lines, out, alone=prompts is None and len(lines) == 1)


def _write(lines: Sequence[dict[str, Any]], out: Path | None, alone: bool) -> None:
    """Completions into a file, or to standard output: the text alone of a single prompt, else JSON lines."""
    from torchstone.storage.atomic import atomic_write
    from torchstone.storage.names import safe_text

    if out is not None:
        atomic_write(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        typer.echo(str(out))
    elif alone:
        typer.echo(safe_text(lines[0]["completion"]))
    else:
        for line in lines:
            typer.echo(json.dumps(line))


def _texts(given: Sequence[str], file: Path | None) -> list[str]:
    """All prompts, those of the command line first.

    Raises:
        ConfigError: there are none.
        DataError: the file is no UTF-8 text, or a line of JSON holds no prompt.
    """
    from torchstone.errors import ConfigError

    texts = [*given, *(_of_file(file) if file is not None else [])]
    if not texts:
        raise ConfigError("there is nothing to continue; give --prompt TEXT, or --prompts FILE with at least one line.")
    return texts


def _of_file(file: Path) -> list[str]:
    from torchstone.errors import DataError

    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text ({error}); give a readable file of prompts.") from error
    if file.suffix.lower() != ".jsonl":
        return [line for line in lines if line.strip()]
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number} is no JSON ({error}); mend it, or name the file .txt.") from error
        text = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise DataError(
                f'{file}, line {number} holds no prompt; each line is a string or an object such as {{"prompt": "text"}}.'
            )
        found.append(text)
    return found


def _complete(batcher: Batcher, requests: Sequence[Request]) -> list[Completion]:
    """Every request's completion, in order, with a progress line on standard error for more than one."""
    for request in requests:
        batcher.submit(request)
    found: dict[int, Completion] = {}
    begun = shown = time.monotonic()
    terminal = sys.stderr is not None and sys.stderr.isatty()
    every = EVERY_TERMINAL if terminal else EVERY_PLAIN
    while len(found) < len(requests):
        found |= dict(batcher.step())
        now, done = time.monotonic(), len(found) == len(requests)
        if len(requests) > 1 and (done or now - shown >= every):
            line = (
                f"generate: {len(found)}/{len(requests)} prompts, {batcher.generated:,} tokens, "
                f"{batcher.generated / max(now - begun, 1e-9):,.0f} per second"
            )
            typer.echo(f"\r{line}\x1b[K" if terminal else line, err=True, nl=done or not terminal)
            shown = now
    return [found[ticket] for ticket in range(len(requests))]


def _line(text: str, completion: Completion, tokenizer: Tokenizer, stops: Sequence[str]) -> dict[str, Any]:
    """What one prompt received, as plain data."""
    written = tokenizer.decode(completion.tokens)
    kept = _until(written, stops)
    reason = "stop" if kept != written else completion.finish_reason
    return {"prompt": text, "completion": kept, "finish_reason": reason, "tokens": len(completion.tokens)}


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
