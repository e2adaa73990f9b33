"""The extrapolation curve of one model as a finding, beside foreign context and random weights."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.evals.extrapolation import LAST, Extrapolation, Windows, extrapolation, text_windows
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, Table
from torchstone.stats.estimate import Estimate

SHORTEST, LONGEST_DEFAULT = 64, 4096


def extrapolation_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    lengths: tuple[int, ...] | None = None,
    trained: int | None = None,
    count: int = 32,
    last: int = LAST,
    seed: int = 0,
) -> Finding:
    """Loss on the same last tokens at several context lengths.

    Args:
        subject: the model.
        texts: documents; every window lies inside one.
        lengths: context lengths in tokens; default: a quarter of the trained length to four times it, as far as text and model
            reach, and at most 4096.
        trained: tokens that training showed at once; default: what the model says of itself.
        count: windows.
        last: scored tokens at the end of every window.
        seed: of the bootstrap and of the untrained control.

    Raises:
        ConfigError: a model that does not say how long its context is, without `trained`; lengths that do not fit.
        DataError: the texts are too short for the longest length, or are a single document.
    """
    trained = subject.trained_length if trained is None else trained
    if trained is None:
        raise ConfigError(
            f"{subject.name} does not say how many tokens it was trained on at once; give trained (--trained N)."
        )
    wanted, windows, notes = _windows(subject, texts, lengths, trained, count)
    near = min(trained, wanted[0])
    own = extrapolation(subject, windows, wanted, last=last)
    foreign = extrapolation(subject, windows, wanted, last=last, near=near)
    untrained = extrapolation(subject.untrained(seed), windows, wanted[:1], last=last)
    return Finding(
        analysis="extrapolation",
        title="Loss on the same last tokens with more context",
        question="Does the model predict the same tokens better, or worse, when it sees more of what came before?",
        subject=subject.describe(),
        answer=_answer(own, foreign, trained, near, seed),
        control=f"Foreign context: everything more than {near} tokens back is replaced by another document's text, so the gap to "
        f"it is what far context is worth. With random weights the same model has {untrained.means[wanted[0]]:.3f} nats.",
        tables=(_table(own, foreign, seed),),
        figures=(_figure(own, foreign, seed),),
        notes=(
            f"{count} windows of {len(set(windows.documents_n.tolist()))} documents; the last {last} tokens of each are scored "
            "at every length. Intervals are bootstrapped over windows, which are the same for all lengths.",
            f"Trained length: {trained} tokens.",
            *notes,
        ),
    )


def _windows(
    subject: Subject, texts: Sequence[str], lengths: tuple[int, ...] | None, trained: int, count: int
) -> tuple[tuple[int, ...], Windows, tuple[str, ...]]:
    """Lengths, windows for the longest of them, and what a reader should know of the choice."""
    limit = _table_of_positions(subject)
    if lengths is not None:
        wanted = tuple(sorted(set(lengths)))
        if limit is not None and wanted and wanted[-1] > limit:
            raise ConfigError(
                f"{subject.name} has a learned table of {limit} positions and cannot read {wanted[-1]} tokens; give lengths of "
                f"at most {limit}."
            )
        return wanted, text_windows(subject, texts, max(wanted, default=0), count), ()
    wanted = default_lengths(trained, limit)
    left_out: list[int] = []
    while True:
        try:
            windows = text_windows(subject, texts, wanted[-1], count)
            break
        except DataError:
            if len(wanted) == 1:
                raise
            left_out.insert(0, wanted[-1])
            wanted = wanted[:-1]
    notes = [f"Left out, because the texts are too short for {count} windows: {left_out} tokens."] if left_out else []
    if wanted[-1] <= trained:
        notes.append("No length lies beyond the trained one; --lengths asks for others.")
    return wanted, windows, tuple(notes)


def default_lengths(trained: int, limit: int | None) -> tuple[int, ...]:
    """A quarter of the trained length to four times it, within 64 … 4096 and the model's table of positions."""
    most = min(LONGEST_DEFAULT, limit or LONGEST_DEFAULT)
    if trained > most:
        return tuple(most // n for n in (16, 8, 4, 2, 1) if most // n >= SHORTEST)
    found = {max(SHORTEST, int(trained * factor)) for factor in (0.25, 0.5, 1, 2, 4)}
    return tuple(sorted(length for length in found if length <= most)) or (most,)


def _table_of_positions(subject: Subject) -> int | None:
    """Longest input of a model whose positions are a learned table; None where positions have no end."""
    rotates = any(layer.rotation is not None for layer in subject.layers)
    return None if rotates else subject.max_length


def _answer(own: Extrapolation, foreign: Extrapolation, trained: int, near: int, seed: int) -> str:
    longest, inside = own.lengths[-1], [length for length in own.lengths if length <= trained]
    if len(own.lengths) == 1:
        return (
            f"With {longest} tokens of context the loss is {own.means[longest]:.3f} nats; one length shows no change."
        )
    sentences = [
        f"Loss changes by {_interval(own.slope(seed))} nats for every doubling of the context, and by "
        f"{_interval(own.rise(longest, seed=seed))} from {own.lengths[0]} to {longest} tokens."
    ]
    if longest > near:
        sentences.append(
            f"Own far context is worth {_interval(foreign.above(own, longest, seed))} nats against foreign text."
        )
    if inside and inside[-1] < longest:
        beyond = own.rise(longest, inside[-1], seed)
        sentences.append(
            f"Beyond {inside[-1]} tokens, within the trained length, it {_word(beyond)} ({_interval(beyond)})."
        )
    return " ".join(sentences)


def _word(change: Estimate) -> str:
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "does not change by more than chance"
    return "rises" if change.low > 0 else "falls"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.effect:+.4f}"
    return f"{estimate.effect:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def _table(own: Extrapolation, foreign: Extrapolation, seed: int) -> Table:
    rows = []
    for length in own.lengths:
        found, rise = own.estimate(length, seed), own.rise(length, seed=seed)
        rows.append(
            (length, found.effect, found.low, found.high, rise.effect, rise.low, rise.high, foreign.means[length])
        )
    columns = ("context", "loss", "low", "high", "above the shortest", "low", "high", "loss with foreign context")
    note = "nats per token; 95 % intervals over windows"
    return Table(title="Loss by context length", columns=columns, rows=tuple(rows), note=note)


def _figure(own: Extrapolation, foreign: Extrapolation, seed: int) -> Figure:
    x = tuple(map(float, own.lengths))
    lines = []
    for name, curve in (("own context", own), ("foreign context", foreign)):
        found = [curve.estimate(length, seed) for length in curve.lengths]
        low, high = tuple(one.low for one in found), tuple(one.high for one in found)
        lines.append(Line(name=name, x=x, y=tuple(one.effect for one in found), low=low, high=high))
    label = "context length (tokens)"
    return Figure(
        title="Length extrapolation", x_label=label, y_label="loss (nats per token)", log_x=True, lines=tuple(lines)
    )
