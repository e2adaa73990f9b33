"""Saturation over training: loss, anisotropy and head spectrum of a series of checkpoints, aligned over tokens.

Godey et al. (arXiv 2404.07647) report that in small models trained for very long the loss turns up again, and that the last
layer's anisotropy jumps and the head's spectrum collapses at the same time; large models show neither. Three things happening
together are no proof that one causes another: the learning-rate schedule and repeated data do things late in training too.

    series = ((step * batch_tokens, open_subject(hub, revision=f"step{step}")) for step in steps)   # opened one by one
    saturation_finding(series, load_texts([]))

A checkpoint counts as saturated if its loss is above the best earlier one by more than `margin` nats. With losses of larger
models `saturation_law` adds the excess over their scaling law.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from torchstone.diagnose.bottleneck.anisotropy import layer_anisotropy
from torchstone.diagnose.bottleneck.head_spectrum import spectrum
from torchstone.diagnose.bottleneck.saturation_law import Run, excess_interval, fit_law
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import DataError
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, PaperFigure, Table

PAPER = (
    PaperFigure(setting="final loss above the law of larger models", paper="8 % on average below 410M (Pythia)"),
    PaperFigure(
        setting="last-layer anisotropy, head spectrum", paper="jump and collapse as the loss turns up; not from 1B on"
    ),
)


@dataclass(frozen=True)
class Point:
    """One checkpoint: tokens seen, loss in nats per token, anisotropy by layer, numbers of the output matrix."""

    tokens: float
    loss: float
    anisotropy: tuple[float, ...]
    centred: tuple[float, ...]
    head: dict[str, float]
    subject: str
    parameters: int


def measure(subject: Subject, texts: Sequence[str], tokens: float, rows: int = 64, length: int = 128) -> Point:
    """All numbers of one checkpoint after `tokens` training tokens, on `rows` rows of `length` tokens of the texts.

    Raises:
        DataError: too little text, or a loss, state or weight that is not finite.
    """
    rows_nt = token_rows(subject, texts, length, rows)
    losses = torch.cat([subject.losses(batch_bt).flatten() for batch_bt in rows_nt.split(8)])
    layers = layer_anisotropy(subject, rows_nt, len(subject.first_tokens()))
    return Point(
        tokens=float(tokens),
        loss=float(losses.double().mean()),
        anisotropy=tuple(layer.raw for layer in layers),
        centred=tuple(layer.centred for layer in layers),
        head=spectrum(subject.head_weight()).metrics(),
        subject=subject.describe(),
        parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
    )


def saturation_finding(
    series: Iterable[tuple[float, Subject]],
    texts: Sequence[str],
    *,
    rows: int = 64,
    length: int = 128,
    margin: float = 0.01,
    larger: Sequence[Run] = (),
) -> Finding:
    """Four aligned curves over training tokens, and the excess over a law of larger models where their losses are given.

    Args:
        series: (training tokens, model) of one model's checkpoints; an iterator is read one by one, so that one model is in
            memory at a time.
        texts: documents for the evaluation, the same for all.
        rows, length: how much text.
        margin: nats above the best earlier loss that count as turning up.
        larger: evaluated checkpoints of larger models on the same texts, for the law.

    Raises:
        DataError: fewer than two checkpoints, two with equal tokens, or one whose losses are not finite.
    """
    points = sorted(
        (measure(subject, texts, tokens, rows, length) for tokens, subject in series), key=lambda p: p.tokens
    )
    if len(points) < 2 or len({point.tokens for point in points}) < len(points):
        raise DataError(
            f"saturation is a course over training and needs at least 2 checkpoints with different token counts; given: "
            f"{[point.tokens for point in points]}."
        )
    best = min(points, key=lambda point: point.loss)
    last = points[-1]
    turned = last.loss - best.loss
    return Finding(
        analysis="saturation",
        title="Saturation over training",
        question="Does the loss turn up while hidden states and output matrix collapse?",
        subject=last.subject,
        answer=_answer(points, best, turned, margin) + _excess(last, best, larger),
        control=(
            "The earlier checkpoints of the same run on the same text; without saturation the loss does not rise, and "
            "anisotropy and spectrum have no sudden change to explain."
        ),
        tables=(_table(points),),
        figures=_figures(points),
        paper=PAPER,
        notes=(
            "Compare checkpoints at equal positions of their learning-rate schedules: decay alone lowers the loss.",
        ),
    )


def _answer(points: Sequence[Point], best: Point, turned: float, margin: float) -> str:
    last = points[-1]
    course = (
        f"the loss ends {turned:.4f} nats above its best ({best.loss:.4f} at {best.tokens:.3g} tokens)"
        if turned > margin
        else f"the loss does not turn up by more than {margin:g} nats"
    )
    return (
        f"Over {len(points)} checkpoints {course}. From the best to the last checkpoint, last-layer anisotropy goes from "
        f"{best.anisotropy[-1]:.3f} to {last.anisotropy[-1]:.3f} and the head's KL to uniform from "
        f"{best.head['kl_uniform']:.3f} to {last.head['kl_uniform']:.3f}."
    )


def _excess(last: Point, best: Point, larger: Sequence[Run]) -> str:
    if not larger:
        return ""
    law = fit_law(larger)
    final, least = (Run("this", point.parameters, point.tokens, point.loss) for point in (last, best))
    interval = excess_interval(final, larger)
    around = f" (95 % interval {interval[0]:+.1%} to {interval[1]:+.1%} over models)" if interval else ""
    return (
        f" Against the law of the larger models the final loss is {law.excess(final):+.1%}{around}, the best one "
        f"{law.excess(least):+.1%}."
    )


def _table(points: Sequence[Point]) -> Table:
    numbers = tuple(points[0].head)
    return Table(
        title="checkpoints",
        columns=("tokens", "loss", "last-layer anisotropy", "centred", *(name.replace("_", " ") for name in numbers)),
        rows=tuple(
            (p.tokens, p.loss, p.anisotropy[-1], p.centred[-1], *(p.head[name] for name in numbers)) for p in points
        ),
    )


def _figures(points: Sequence[Point]) -> tuple[Figure, ...]:
    x = tuple(point.tokens for point in points)
    log = x[0] > 0

    def figure(title: str, unit: str, lines: Sequence[tuple[str, Sequence[float]]]) -> Figure:
        drawn = tuple(Line(name=name, x=x, y=tuple(values)) for name, values in lines)
        return Figure(title=title, x_label="training tokens", y_label=unit, log_x=log, lines=drawn)

    last = len(points[0].anisotropy) - 1
    chosen = sorted({0, last // 2, last - 1, last})
    layers = [(f"state {layer} of {last}", [point.anisotropy[layer] for point in points]) for layer in chosen]
    return (
        figure("Loss", "nats per token", [("loss", [point.loss for point in points])]),
        figure("Anisotropy", "mean cosine", layers),
        figure("KL to uniform of the head's spectrum", "nats", [("head", [p.head["kl_uniform"] for p in points])]),
        figure("Effective rank of the head", "directions", [("head", [p.head["effective_rank"] for p in points])]),
    )
