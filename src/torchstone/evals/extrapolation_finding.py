"""The extrapolation curve of one model as a finding, beside foreign context and random weights."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.evals.extrapolation import LAST, Extrapolation, extrapolation
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, Table
from torchstone.stats.estimate import Estimate

SHORTEST = 64


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
        lengths: context lengths in tokens; default: a quarter of the trained length to four times it.
        trained: tokens that training showed at once; default: what the model says of itself.
        count: windows.
        last: scored tokens at the end of every window.
        seed: of the bootstrap and of the untrained control.

    Raises:
        ConfigError: a model that does not say how long its context is, without `trained`; lengths that do not fit.
        DataError: the texts are too short for the longest length.
    """
    trained = subject.trained_length if trained is None else trained
    if trained is None:
        raise ConfigError(
            f"{subject.name} does not say how many tokens it was trained on at once; give trained (--trained N)."
        )
    wanted = tuple(sorted(set(lengths or _default_lengths(trained))))
    windows_nt = token_rows(subject, texts, wanted[-1] + 1, count, beyond_context=True)
    own = extrapolation(subject, windows_nt, wanted, last=last)
    foreign = extrapolation(subject, windows_nt, wanted, last=last, trained=min(trained, wanted[0]))
    untrained = extrapolation(subject.untrained(seed), windows_nt, wanted[:1], last=last)
    near = min(trained, wanted[0])
    return Finding(
        analysis="extrapolation",
        title="Loss on the same last tokens with more context",
        question="Does the model predict the same tokens better, or worse, when it sees more of what came before?",
        subject=subject.describe(),
        answer=_answer(own, foreign, trained, seed),
        control=f"Foreign context: everything more than {near} tokens back is replaced by another window's text, so the gap to "
        f"it is what far context is worth. With random weights the same model has {untrained.means[wanted[0]]:.3f} nats.",
        tables=(_table(own, foreign, seed),),
        figures=(_figure(own, foreign, seed),),
        notes=(
            f"{windows_nt.shape[0]} windows; the last {last} tokens of each are scored at every length. Intervals are "
            "bootstrapped over windows, which are the same for all lengths.",
            f"Trained length: {trained} tokens.",
        ),
    )


def _default_lengths(trained: int) -> list[int]:
    return [max(SHORTEST, int(trained * factor)) for factor in (0.25, 0.5, 1, 2, 4)]


def _answer(own: Extrapolation, foreign: Extrapolation, trained: int, seed: int) -> str:
    longest, inside = own.lengths[-1], [length for length in own.lengths if length <= trained]
    sentences = []
    if len(own.lengths) > 1:
        slope = own.slope(seed)
        sentences.append(f"Loss changes by {_interval(slope)} nats for every doubling of the context.")
        rise = own.rise(longest, seed)
        sentences.append(f"At {longest} tokens it is {_interval(rise)} above that at {own.lengths[0]}.")
    gain = foreign.means[longest] - own.means[longest]
    sentences.append(f"Own far context is worth {gain:.3f} nats against foreign text.")
    if inside and inside[-1] < longest:
        beyond = own.means[longest] - own.means[inside[-1]]
        sentences.append(
            f"Beyond the trained length the loss {'rises' if beyond > 0 else 'falls'} by {abs(beyond):.3f}."
        )
    return " ".join(sentences)


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.effect:+.4f}"
    return f"{estimate.effect:+.4f} ({estimate.low:+.4f} to {estimate.high:+.4f})"


def _table(own: Extrapolation, foreign: Extrapolation, seed: int) -> Table:
    rows = []
    for length in own.lengths:
        found, rise = own.estimate(length, seed), own.rise(length, seed)
        rows.append(
            (length, found.effect, found.low, found.high, rise.effect, rise.low, rise.high, foreign.means[length])
        )
    columns = ("context", "loss", "low", "high", "above the shortest", "low", "high", "loss with foreign context")
    return Table(
        title="Loss by context length",
        columns=columns,
        rows=tuple(rows),
        note="nats per token; 95 % intervals over windows",
    )


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
