"""Which tokens a run learned, knew, forgot or never learned, over its checkpoints; see `torchstone.evals.trajectories`.

    torchstone eval trajectories runs/mine

A run keeps only its last checkpoints unless it is told otherwise: train with `checkpoint.every` and a larger `checkpoint.keep`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.loss_store import read_block, write_block
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import load_texts, token_rows
from torchstone.errors import ConfigError, DataError
from torchstone.evals.scoring import weights_hash, window_losses
from torchstone.evals.trajectories import (
    CATEGORIES,
    LEAST,
    MEANING,
    THRESHOLD,
    Trajectories,
    categorise,
    shares_so_far,
    without_change,
)
from torchstone.report.finding import Finding, TokenSpan, TokenText
from torchstone.report.result import Figure, Line, PaperFigure, Table
from torchstone.storage.hashing import bytes_hash, fingerprint_of
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.names import RECORD
from torchstone.train.run import load_run

ROWS = 16  # sequences that a model reads at once
UNKNOWN = "\ufffd"  # what bytes are decoded to that are no whole character
LONGEST_CHARACTER = 4  # bytes
AROUND = 12  # tokens of context on either side of an example
PAPER = {"H>L": "26 %", "L>L": "51 %", "H>H": "11 %", "L>H": "12 %"}


def trajectories_finding(
    subject: Subject,
    *,
    steps: tuple[int, ...] | None = None,
    files: tuple[str, ...] | None = None,
    sequences: int = 64,
    threshold: float = THRESHOLD,
    examples: int = 4,
    directory: Path | None = None,
) -> Finding:
    """Sort held-out tokens by how their loss moves over a run's checkpoints.

    Args:
        subject: a run of `torchstone train`.
        steps: checkpoints, at least 3, evenly spaced; default: all that the run kept.
        files: text files in place of the run's own held-out sequences.
        sequences: how many sequences, each as long as those of training.
        threshold: change of the fitted loss, in nats, above which a token counts as learned or forgotten.
        examples: tokens of each category that are shown in their text.
        directory: where finished checkpoints' losses are kept, from which the same call continues; None keeps nothing.

    Raises:
        ConfigError: no torchstone run, fewer than 3 checkpoints, one that is not there, no sequence, a negative number of
            examples, or a subject that was opened at another checkpoint than the newest. DataError: too little text.
    """
    _check_counts(sequences, examples)
    run = _run_of(subject)
    wanted = _steps(subject, run, steps)
    batches = list(_held_out(run, sequences)) if files is None else _of_files(subject, files, sequences)
    rows = [_losses(subject, run, step, batches, directory) for step in wanted]
    targets_bt = torch.cat([batch.targets_bt for batch in batches])
    valid_bt = (targets_bt != IGNORE).numpy()
    losses_nm = np.stack([losses_bt[valid_bt] for losses_bt in rows], axis=1)
    found = categorise(losses_nm, threshold)
    shares = found.shares()
    named = ", ".join(f"{100 * shares[name]:.0f} % {MEANING[name]} ({name})" for name in CATEGORIES)
    first, last = losses_nm[:, 0].mean(), losses_nm[:, -1].mean()
    return Finding(
        analysis="trajectories",
        title="How the loss of each token moves during training",
        question="Which tokens does this run learn, and which did it know, forget or never learn?",
        subject=subject.describe(),
        answer=f"Of {len(losses_nm):,} held-out tokens over {len(wanted)} checkpoints: {named}. The mean loss went from "
        f"{first:.3f} to {last:.3f} nats.",
        control=_control(losses_nm, threshold),
        tables=(_shares_table(found, losses_nm), _steps_table(wanted, losses_nm, found)),
        figures=_figures(wanted, losses_nm, found, threshold),
        token_texts=_examples(subject, batches, valid_bt, losses_nm, found, examples),
        paper=tuple(
            PaperFigure(setting=f"{name}: {MEANING[name]}", paper=PAPER[name], ours=f"{100 * shares[name]:.0f} %",
                        note="TinyLlama, 15B tokens of OpenWebMath, 15 checkpoints")
            for name in CATEGORIES
        ),
        notes=(
            f"A token has changed if the fitted line moves by more than {threshold:g} nats; of the others those with a last loss "
            f"of at most the mean, {found.mean_last:.3f}, count as known.",
            f"Checkpoints: {', '.join(map(str, wanted))}. The line takes them as evenly spaced."
            + ("" if _even(wanted) else " They are not."),
        ),
    )  # fmt: skip


def _check_counts(sequences: int, examples: int) -> None:
    if sequences < 1:
        raise ConfigError(f"sequences is {sequences}; give the number of sequences that are scored, at least 1.")
    if examples < 0:
        raise ConfigError(f"examples is {examples}; give how many tokens of each category are shown, 0 or more.")


def _run_of(subject: Subject) -> Path:
    run = Path(subject.name)
    if not (run / RECORD).is_file():
        raise ConfigError(
            f"{subject.name} is no run directory of torchstone train, and trajectories need several checkpoints of one run; give "
            "the directory of one."
        )
    return run


def _steps(subject: Subject, run: Path, steps: tuple[int, ...] | None) -> list[int]:
    """The checkpoints to use; raises ConfigError for too few or for one that is not there."""
    there = CheckpointStore(run / "checkpoints").steps()
    wanted = there if steps is None else sorted(set(steps))
    absent = sorted(set(wanted) - set(there))
    if absent:
        raise ConfigError(f"{run} has no checkpoint of step {absent[0]}; its steps are {', '.join(map(str, there))}.")
    if len(wanted) < LEAST:
        raise ConfigError(
            f"trajectories need at least {LEAST} checkpoints, and {len(wanted)} are there "
            f"({', '.join(map(str, wanted)) or 'none'}). Train with more of them, for example checkpoint.every=STEPS and "
            "checkpoint.keep=10."
        )
    _check_newest(subject, run)
    return wanted


def _check_newest(subject: Subject, run: Path) -> None:
    """Raise ConfigError where one other checkpoint than the newest was asked for: all are read, whichever was opened."""
    newest = open_subject(run, device=subject.device, dtype=next(subject.model.parameters()).dtype)
    if weights_hash(newest.model) != weights_hash(subject.model):
        raise ConfigError(
            f"one checkpoint of {run} was opened (--step), and trajectories read several: leave step out, and name the "
            "checkpoints with steps (--steps 1000,2000,3000) if not all are meant."
        )


def _held_out(run: Path, sequences: int) -> Any:
    _, _, data = load_run(run)
    return data.evaluation(ROWS, sequences)


def _of_files(subject: Subject, files: Sequence[str], sequences: int) -> list[Batch]:
    """Sequences of text files, as long as those of training."""
    tokens_nt = token_rows(subject, load_texts(files), (subject.trained_length or 128) + 1, sequences).cpu()
    return [Batch(piece[:, :-1], piece[:, 1:]) for piece in tokens_nt.split(ROWS)]


def _losses(
    given: Subject, run: Path, step: int, batches: Sequence[Batch], directory: Path | None
) -> NDArray[np.float32]:
    """Losses [b, t] of one checkpoint, on the device and in the type of the given one; from the folder if they are there."""
    shape = (sum(len(batch.tokens_bt) for batch in batches), batches[0].tokens_bt.shape[1])
    subject = open_subject(run, step=step, device=given.device, dtype=next(given.model.parameters()).dtype)
    content = [bytes_hash(torch.stack([batch.tokens_bt, batch.targets_bt]).numpy().tobytes()) for batch in batches]
    path = None
    if directory is not None:
        path = directory / "losses" / f"step-{step:08d}-{fingerprint_of([weights_hash(subject.model), content])}"
        there = read_block(path, shape, "<f4")
        if there is not None:
            return there
    found = torch.cat([window_losses(subject, batch).float().cpu() for batch in batches]).numpy()
    if not np.isfinite(found).all():
        raise DataError(
            f"the checkpoint of step {step} of {run} gives a loss that is not finite; leave it out (--steps)."
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_block(path, found.astype("<f4"))
    return found


def _control(losses_nm: NDArray[np.float32], threshold: float) -> str:
    """What the rule finds where nothing is learned: constant losses with the noise of each token about its fitted line."""
    shares = categorise(without_change(losses_nm), threshold).shares()
    changed = 100 * (shares["H>L"] + shares["L>H"])
    return (
        "Constant losses with the same noise (each token's residuals about its fitted line, in random order, about its mean), in "
        f"which nothing is learned or forgotten: the rule then calls {100 * shares['H>L']:.0f} % learned and "
        f"{100 * shares['L>H']:.0f} % forgotten. Of the tokens that are said to change, up to {changed:.0f} % of all may so be "
        "noise of single losses."
    )


def _shares_table(found: Trajectories, losses_nm: NDArray[np.float32]) -> Table:
    rows = []
    for name in CATEGORIES:
        here_n = found.category_n == name
        means = [float(one.mean()) if len(one) else None for one in (losses_nm[here_n, 0], losses_nm[here_n, -1])]
        rows.append((name, MEANING[name], int(here_n.sum()), float(here_n.mean()), *means))
    columns = ("category", "meaning", "tokens", "share", "first loss", "last loss")
    return Table(title="Categories of tokens", columns=columns, rows=tuple(rows), note="mean losses in nats")


def _steps_table(steps: Sequence[int], losses_nm: NDArray[np.float32], found: Trajectories) -> Table:
    rows = tuple(
        (step, *(_mean(losses_nm[found.category_n == name, at]) for name in CATEGORIES), float(losses_nm[:, at].mean()))
        for at, step in enumerate(steps)
    )
    return Table(title="Mean loss by checkpoint", columns=("step", *CATEGORIES, "all"), rows=rows, note="nats")


def _mean(values: NDArray[np.float32]) -> float | None:
    return float(values.mean()) if len(values) else None


def _even(steps: Sequence[int]) -> bool:
    return len({after - before for before, after in itertools.pairwise(steps)}) <= 1


def _figures(
    steps: Sequence[int], losses_nm: NDArray[np.float32], found: Trajectories, threshold: float
) -> tuple[Figure, Figure]:
    """Stacked shares over the training so far, and the mean loss of each category."""
    x = tuple(map(float, steps))
    so_far = shares_so_far(losses_nm, threshold)
    stacked, floor = [], [0.0] * len(so_far)
    for name in reversed(CATEGORIES):
        top = [below + shares[name] for below, shares in zip(floor, so_far, strict=True)]
        label = f"{name} {MEANING[name]}"
        stacked.append(Line(name=label, x=x[LEAST - 1 :], y=tuple(top), low=tuple(floor), high=tuple(top)))
        floor = top
    lines = [
        Line(name=f"{name} {MEANING[name]}", x=x, y=tuple(_mean(at) for at in losses_nm[found.category_n == name].T))
        for name in reversed(CATEGORIES)  # all of them, so that each has one colour in both figures
    ]
    ends = found.shares()
    note = (
        "The height of a band is the share of its category, judged by the checkpoints so far; numbers are upper edges. At the "
        "end: " + ", ".join(f"{name} {100 * ends[name]:.1f} %" for name in reversed(CATEGORIES)) + "."
    )
    return (
        Figure(title="Shares of tokens, stacked", x_label="checkpoints up to step", y_label="share of tokens",
               lines=tuple(stacked), note=note),
        Figure(title="Mean loss of each category", x_label="step", y_label="loss (nats per token)", lines=tuple(lines)),
    )  # fmt: skip


def _examples(
    subject: Subject,
    batches: Sequence[Batch],
    valid_bt: NDArray[np.bool_],
    losses_nm: NDArray[np.float32],
    found: Trajectories,
    count: int,
) -> tuple[TokenText, ...]:
    """Pieces of text around the tokens that show each category most clearly, coloured by the change of the fitted loss."""
    tokens_bt = torch.cat([batch.tokens_bt for batch in batches])
    targets_bt = torch.cat([batch.targets_bt for batch in batches])
    places = np.argwhere(valid_bt)
    delta_bt = np.full(valid_bt.shape, np.nan)
    delta_bt[valid_bt] = found.delta_n
    category_bt = np.full(valid_bt.shape, "", dtype=found.category_n.dtype)
    category_bt[valid_bt] = found.category_n
    clear_n = {
        "H>L": found.delta_n,
        "L>H": -found.delta_n,
        "H>H": -losses_nm.mean(axis=1),
        "L>L": losses_nm.mean(axis=1),
    }
    texts = []
    for name in CATEGORIES:
        members = np.flatnonzero(found.category_n == name)
        best = _of_different_rows(members[np.argsort(clear_n[name][members], kind="stable")], places[:, 0], count)
        spans: list[TokenSpan] = []
        for number, index in enumerate(best):
            row, at = map(int, places[index])
            if number:
                spans.append(TokenSpan(text="\n\n"))
            spans += _piece(subject, tokens_bt[row], targets_bt[row], delta_bt[row], category_bt[row] == name, at)
        if spans:
            title = f"{name}: {MEANING[name]}"
            note = f"{len(best)} of {len(members):,} tokens, those that show it most clearly, with what stands around them."
            texts.append(
                TokenText(title=title, value_label="change of the fitted loss (nats)", mark_label=f"category {name}",
                          spans=tuple(spans), note=note)
            )  # fmt: skip
    return tuple(texts)


def _of_different_rows(tokens: NDArray[np.int64], rows_n: NDArray[np.int64], count: int) -> list[int]:
    """The first `count` tokens that lie in different rows."""
    first: dict[int, int] = {}
    for token in tokens.tolist():
        if len(first) == count:
            break
        first.setdefault(int(rows_n[token]), token)
    return list(first.values())


def _piece(
    subject: Subject,
    tokens_t: Tensor,
    targets_t: Tensor,
    delta_t: NDArray[np.float64],
    marked_t: NDArray[np.bool_],
    at: int,
) -> list[TokenSpan]:
    """The targets around one, each with its change; those that are parts of one character are one span."""
    spans: list[TokenSpan] = []
    held: list[int] = []  # tokens of a character that is not complete
    values: list[float] = []
    marked = False
    last = min(len(targets_t), at + AROUND + 1) - 1
    for place in range(max(0, at - AROUND), min(len(targets_t), at + AROUND + 1)):
        target = int(targets_t[place])
        if target == IGNORE:  # predicted by nothing, but part of the text
            target = int(tokens_t[place + 1]) if place + 1 < len(tokens_t) else -1
        held += [target] if target >= 0 else []
        values += [float(delta_t[place])] if np.isfinite(delta_t[place]) else []
        marked = marked or bool(marked_t[place])
        piece = subject.decode(held) if held else ""
        if UNKNOWN in piece and len(held) < LONGEST_CHARACTER and place < last:
            continue
        spans.append(TokenSpan(text=piece, value=max(values, key=abs) if values else None, marked=marked))
        held, values, marked = [], [], False
    return spans
