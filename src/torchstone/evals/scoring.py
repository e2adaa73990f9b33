"""Each token's loss under a model: of a recipe's training windows into a loss store, and of any texts.

    score_data(source, reference, Path("scores"), about=identity(reference))      -> LossStore, read by `data: scored`
    score_text(subject, ids, window=512, stride=256)                              -> losses of one text's tokens

Both are done in pieces that are kept whole, so that the same call continues after an interruption, and a piece never depends
on which call computed it.

Windows of long texts overlap: the first predicts all of its tokens, each later one only its last `stride`, so that every token is
scored once and, but for the first window, with at least `window - stride` tokens before it.

Shapes: b rows · t tokens · n tokens of a text.

Pitfall: excess loss compares two losses of the same token in the same context, so both models read the same windows; a model
that could read more gains nothing from it here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from torchstone.data.batch import Batch
from torchstone.data.loss_store import Header, LossStore, LossStoreWriter, Precision
from torchstone.data.text import TextSource
from torchstone.data.tokenizer import Tokenizer
from torchstone.diagnose.subject import Subject, as_tokens
from torchstone.errors import ConfigError, DataError
from torchstone.models.decoder import Decoder
from torchstone.objectives.next_token import NextTokenConfig
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.names import RECORD
from torchstone.train.record import read_record

BLOCK_TOKENS = 1 << 16  # targets of a block: what an interruption costs at most
ROW_TOKENS = 1 << 13  # tokens that a model reads at once
SECONDS = 5.0  # between two plain lines of progress
Report = Callable[[int, int], None]


def quiet(done: int, total: int) -> None:
    """No progress."""


@contextmanager
def counting(what: str, unit: str = "windows") -> Iterator[Report]:
    """Yields a function of (done, total): a bar on a terminal, a plain line every few seconds elsewhere; on stderr."""
    if sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"{what} ({unit})", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    begun = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= SECONDS:
            last = now
            print(f"{what}: {done:,} of {total:,} {unit}, {now - begun:.0f} s", file=sys.stderr, flush=True)

    yield line


def identity(subject: Subject, step: int | None = None) -> dict[str, Any]:
    """Who a model is, as plain data: its name, for a run its id, fingerprint and step, and a hash of all its weights.

    Args:
        subject: the model.
        step: checkpoint that was opened of a run; None: the newest.
    """
    found: dict[str, Any] = {"model": subject.name, "architecture": subject.architecture}
    directory = Path(subject.name)
    if (directory / RECORD).is_file():
        record = read_record(directory)
        newest = CheckpointStore(directory / "checkpoints").latest() if step is None else step
        found |= {"run": record.id, "fingerprint": record.fingerprint, "step": newest}
    return {**found, "weights": weights_hash(subject.model)}


def weights_hash(model: nn.Module) -> str:
    """32 hexadecimal digits of every parameter and buffer that a checkpoint holds, with their names, and of the model's class and
    settings, since equal weights compute other losses with, for example, other heads or rotations."""
    digest = xxhash.xxh3_128(_settings_of(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings_of(model: nn.Module) -> str:
    """Class and settings of a model as text, without the place that it was loaded from."""
    config = getattr(model, "config", None)
    if config is None:
        return type(model).__qualname__
    settings = config.model_dump(mode="json") if hasattr(config, "model_dump") else config.to_dict()
    content = {name: value for name, value in settings.items() if name not in _PLACES}
    return f"{type(model).__qualname__} {json.dumps(content, sort_keys=True, default=str)}"


_PLACES = {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype"}


def check_vocabulary(reference: Subject, name: str, vocab_size: int) -> None:
    """Raise ConfigError, naming both numbers, unless a reference has exactly the token ids of what it is compared with."""
    if reference.vocab_size != vocab_size:
        raise ConfigError(
            f"reference vocab {reference.vocab_size} ≠ model vocab {vocab_size}: {reference.name} and {name} do not share a "
            "tokenizer, so that their losses are of different tokens. Give two models with one tokenizer."
        )


def check_tokenizer(reference: Subject, name: str, encode: Callable[[str], list[int]], texts: Sequence[str]) -> None:
    """Raise ConfigError unless the reference's tokenizer makes the same ids of some texts."""
    for text in texts:
        own, other = reference.encode(text), encode(text)
        if own == other:
            continue
        at = next(
            (i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), min(len(own), len(other))
        )
        raise ConfigError(
            f"the tokenizers of the reference {reference.name} and of {name} differ: of the same text they make {len(own)} and "
            f"{len(other)} tokens, and token {at} is not the same. Give two models with one tokenizer."
        )


def score_data(
    source: TextSource,
    reference: Subject,
    path: str | Path,
    *,
    about: Mapping[str, Any],
    precision: Precision = "float16",
    report: Report = quiet,
) -> LossStore:
    """Write the reference's loss on every training target of a source, or continue what an interruption left.

    Args:
        source: the text.
        reference: a model with the text's tokenizer.
        path: folder of the store.
        about: `identity` of the reference.
        precision: of the stored losses; see `torchstone.data.loss_store` for the rounding.
        report: receives windows done and windows in all.

    Raises:
        ConfigError: another vocabulary, tokenizer or a shorter context; the folder holds losses of other data or of
            another reference. DataError: a loss that is not finite, or a folder that is no store.
    """
    check_vocabulary(reference, "the data", source.vocab_size)
    check_tokenizer(reference, "the data", source.tokenizer.encode, _sample(source))
    if reference.max_length is not None and source.length > reference.max_length:
        raise ConfigError(
            f"the data's sequences have {source.length} tokens, and {reference.name} reads at most {reference.max_length}; "
            f"set data.length to {reference.max_length} or less, or give another reference."
        )
    rows = max(1, BLOCK_TOKENS // source.length)
    header = Header(
        source.fingerprint, source.tokenizer.fingerprint, about, source.windows, source.length, rows, precision
    )
    writer = LossStoreWriter(Path(path), header)
    missing = writer.missing()
    done = source.windows - sum(len(header.span(block)) for block in missing)
    report(done, source.windows)
    for block in missing:
        span = header.span(block)
        writer.write(block, _losses_of(reference, source, span))
        report(done := done + len(span), source.windows)
    return writer.finish()


def _losses_of(reference: Subject, source: TextSource, span: range) -> NDArray[np.float32]:
    """fp32 [r, t], the same however the work was divided before."""
    size = max(1, ROW_TOKENS // source.length)
    pieces = [
        window_losses(reference, source.window(np.arange(start, min(start + size, span.stop)))).float().cpu().numpy()
        for start in range(span.start, span.stop, size)
    ]
    return np.concatenate(pieces)


@torch.no_grad()
def window_losses(subject: Subject, batch: Batch) -> Tensor:
    """Losses [b, t] of a batch's targets, 0 where there is none; as a recipe's own evaluation computes them.

    Raises:
        ConfigError: rows of several documents that must not see each other, for a model that is not torchstone's.
    """
    if isinstance(subject.model, Decoder):
        return NextTokenConfig().build()(subject.model, batch.to(subject.device)).per_token_bt
    if batch.documents_bt is not None:
        raise ConfigError(
            f"data.mask_documents keeps documents of a row apart, which {subject.name} ({subject.architecture}) is not told; "
            "set data.mask_documents=false, or give a torchstone run as reference."
        )
    tokens_bt = torch.cat([batch.tokens_bt, batch.targets_bt[:, -1:]], dim=1)
    return subject.losses(tokens_bt.to(subject.device))


def _sample(source: TextSource) -> list[str]:
    """Held-out text of a few windows, for comparing tokenizers."""
    batch = next(source.evaluation(2, min(2, source.held_out)))
    tokenizer: Tokenizer = source.tokenizer
    return [tokenizer.decode(row) for row in batch.tokens_bt.tolist()]


def windows_of(count: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(first token, first scored token) of the windows that score every token but the first of `count` once."""
    if count <= window:
        return [(0, 1)] if count > 1 else []
    found, end = [(0, 1)], window
    while end < count:
        after = min(end + stride, count)
        found.append((after - window, end))
        end = after
    return found


Keep = Callable[[int, int, Callable[[], NDArray[np.float32]]], NDArray[np.float32]]


def _kept_nowhere(number: int, count: int, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    return compute()


@torch.no_grad()
def score_text(
    subject: Subject, ids: Sequence[int], *, window: int, stride: int, keep: Keep = _kept_nowhere
) -> NDArray[np.float32]:
    """Losses [n] of a text's tokens; nan for a first token that nothing stands before.

    Args:
        subject: the model; what its tokenizer puts before a text stands before the first token.
        ids: tokens of the text.
        window: tokens that the model sees at once.
        stride: tokens that each window after the first one scores.
        keep: receives the number of a block of windows, how many losses it has, and the function that computes them; may return
            what an earlier call computed.

    Raises:
        ConfigError: a stride outside 1 … window-1, or a window beyond the model's context.
        DataError: a loss that is not finite.
    """
    check_window(subject, window, stride)
    first = subject.first_tokens()
    row = [*first, *ids]
    losses_n = np.full(len(row), np.nan, dtype=np.float32)
    places = windows_of(len(row), window, stride)
    size, length = max(1, ROW_TOKENS // window), min(window, len(row))

    def losses_of(block: list[tuple[int, int]]) -> NDArray[np.float32]:
        pieces = []
        for start in range(0, len(block), size):
            group = block[start : start + size]
            tokens_bt = as_tokens([row[begin : begin + length] for begin, _ in group], subject.device)
            found_bt = subject.losses(tokens_bt).float().cpu().numpy()
            pieces += [found_t[scored - begin - 1 :] for (begin, scored), found_t in zip(group, found_bt, strict=True)]
        return np.concatenate(pieces)

    per = size * max(1, BLOCK_TOKENS // ROW_TOKENS)
    for number, start in enumerate(range(0, len(places), per)):
        block = places[start : start + per]
        scored, end = block[0][1], block[-1][0] + length
        losses_n[scored:end] = keep(number, end - scored, partial(losses_of, block))
    return losses_n[len(first) :]


def check_window(subject: Subject, window: int, stride: int) -> None:
    """Raise ConfigError for a window that a model cannot read, or a stride that does not fit it."""
    if window < 2 or not 1 <= stride < window:
        raise ConfigError(
            f"window {window} and stride {stride} were given; a window has at least 2 tokens, and a stride lies between 1 and "
            "window - 1."
        )
    if subject.max_length is not None and window > subject.max_length:
        raise ConfigError(
            f"a window of {window} tokens was given, and {subject.name} reads at most {subject.max_length}; give a smaller one "
            "(--window)."
        )


def default_window(*subjects: Subject) -> int:
    """The shortest of the lengths that the models were trained on, at most 1024."""
    known = [length for subject in subjects for length in (subject.trained_length, subject.max_length) if length]
    return min([1024, *known])


def check_same_tokens(model: Subject, reference: Subject, texts: Sequence[str]) -> None:
    """Raise unless two models have one tokenizer, judged on these texts; DataError where there is nothing to score."""
    if not any(text.strip() for text in texts):
        raise DataError("there is no text to score; give files that hold some.")
    check_vocabulary(reference, model.name, model.vocab_size)
    check_tokenizer(reference, model.name, model.encode, texts)
    if model.first_tokens() != reference.first_tokens():
        raise ConfigError(
            f"{model.name} starts a text with the tokens {model.first_tokens()} and the reference {reference.name} with "
            f"{reference.first_tokens()}; give two models with one tokenizer."
        )
