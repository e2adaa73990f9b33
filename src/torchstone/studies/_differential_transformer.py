"""Metrics of the differential transformer's study, and the paper's numbers with ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchstone.lab.study import Cell, Measurement
from torchstone.report.result import Metric, PaperFigure

METRICS = (
    Metric(name="noise_mass", label="attention off the answer (best head, stressed recall)", better="lower"),
    Metric(name="answer_mass", label="attention on the answer (best head, stressed recall)", better="higher"),
    Metric(name="stress_accuracy", label="accuracy on stressed recall", better="higher"),
    Metric(name="steps_to_90", label="steps to 90 % recall (censored)", unit="steps", better="lower"),
    Metric(name="largest_score", label="largest |attention score|", better="lower"),
    Metric(name="entropy", label="attention entropy (best head)", unit="nats", better="neither"),
    Metric(name="ar_hit_loss", label="loss on AR-hits", unit="nats/token", better="lower"),
    Metric(name="other_loss", label="loss on other tokens", unit="nats/token", better="lower"),
    Metric(name="validation_loss", label="validation loss", unit="nats/token", better="lower"),
)
SMALL = "at toy scale the models have tens of thousands of parameters, the paper's billions"


def beside(cells: Sequence[tuple[Cell, Measurement]]) -> tuple[PaperFigure, ...]:
    """The paper's numbers and our means over seeds; settings that this study does not measure stay empty."""
    rows: dict[str, list[Mapping[str, float]]] = {}
    for cell, measurement in cells:
        rows.setdefault(cell.arm.name, []).append(measurement.metrics)

    def mean(arm: str, metric: str) -> str:
        values = [row[metric] for row in rows.get(arm, ()) if metric in row]
        return f"{sum(values) / len(values):.3g}" if values else "–"

    def pair(metric: str, prefix: str = "", after: str = "diff-v1") -> str:
        return f"{mean(prefix + 'softmax', metric)} → {mean(prefix + after, metric)}"

    hits = f"{pair('ar_hit_loss', 'text.')} / {pair('other_loss', 'text.')}"
    return (
        PaperFigure(
            setting="validation loss on text",
            paper="3.087 → 3.062 (1.4B)",
            ours=pair("validation_loss", "text."),
            note=SMALL,
        ),
        PaperFigure(setting="loss on AR-hits / other tokens", paper="0.898 → 0.880 / 3.272 → 3.247 (1.4B)", ours=hits),
        PaperFigure(
            setting="attention on noise",
            paper="0.52 → 0.02 (3B, mean)",
            ours=pair("noise_mass"),
            note="ours: best head",
        ),
        PaperFigure(
            setting="attention on the answer",
            paper="0.03 → 0.31 (3B, mean)",
            ours=pair("answer_mass"),
            note="ours: best head",
        ),
        PaperFigure(setting="largest |attention score|", paper="318 → 38.8", ours=pair("largest_score")),
        PaperFigure(
            setting="version 1 without its norm, loss",
            paper="3.122 on text (worse than softmax, 3.087)",
            ours=pair("validation_loss", after="diff-v1-no-norm") + " on recall",
        ),
    )
