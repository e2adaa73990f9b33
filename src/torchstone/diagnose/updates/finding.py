"""Sizes of the updates of a run, by every measure, with another run laid over them.

    torchstone train recipe.yaml --updates 10 --out runs/none schedule.warmup=0
    torchstone train recipe.yaml --updates 10 --out runs/warm schedule.warmup=0.05
    torchstone diagnose updates runs/none --against runs/warm

Which measure of the first updates is out of line (Kosson, Messmer and Jaggi, arXiv 2410.23922): their length, the
angle by which they turn the weights, or the change of what layers compute; and how noisy the gradients are meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchstone.diagnose.subject import Subject
from torchstone.diagnose.updates.series import (
    EARLY,
    LATE,
    NAMES,
    EarlyLate,
    Record,
    curve,
    early_late,
    per_rate,
    read_updates,
)
from torchstone.diagnose.updates.suggest import suggest_warmup
from torchstone.errors import ConfigError, DataError
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, Table

POINTS = 200
UNITS = {"angle": "rad", "neuron_angle": "rad", "critical_batch": "sequences"}
SIZES = ("l2", "relative", "angle", "rrc")


def updates_finding(subject: Subject, *, against: Path | None = None) -> Finding:
    """Early and late updates of a run, and curves of every measure.

    Args:
        subject: a run directory with `updates.jsonl`, as `torchstone train --updates` leaves it.
        against: another such directory, laid over the first: the same recipe with another warmup or optimizer.

    Raises:
        DataError: a directory without records of updates.
    """
    return finding_of(read_updates(Path(subject.name)), subject.describe(), against)


def finding_of(records: Sequence[Record], subject: str, against: Path | Sequence[Record] | None = None) -> Finding:
    """The same from records.

    Args:
        records: of one run, as a meter or `read_updates` gives them.
        subject: one line that names it.
        against: records of another run, or a folder that has them.
    """
    name = "other run"
    if isinstance(against, Path):
        name, against = against.name, read_updates(against)
    runs = {"this run": records} | ({} if against is None else {name: against})
    return Finding(
        analysis="updates",
        title="Sizes of updates",
        question="Are the first updates larger than the later ones, and by which measure?",
        subject=subject,
        answer=_answer(runs),
        control=(
            "Later updates of the same run, and the other run where one is given. Sizes follow the learning rate, so "
            "ratios are given as measured and at equal rate."
        ),
        tables=(_early_late_table(runs), _matrix_table(records)),
        figures=_figures(runs),
        notes=(
            f"Early: median over steps 1 to {EARLY}. Late: median over {LATE[0]:.0%} to {LATE[1]:.0%} of the recorded steps.",
            "The critical batch size is B divided by the signal-to-noise ratio of a batch of B; a gradient that turns "
            "quickly looks like noise, and one that swings back and forth like less than that: ratios from moments are too low "
            "there, early and late, and 0 where they are cut off.",
        ),
    )


def _answer(runs: Mapping[str, Sequence[Record]]) -> str:
    sentences = []
    for name, records in runs.items():
        found = {size: _both(records, size) for size in SIZES}
        ratios = [
            f"{NAMES[size]} {both.ratio:.2g}"
            for size, both in found.items()
            if both is not None and both.ratio is not None
        ]
        said = ", ".join(ratios) if ratios else "not recorded at both ends"
        sentences.append(f"Early over late updates of {name}: {said}.")
    try:
        sentences.append(suggest_warmup(list(runs["this run"])).describe())
    except (ConfigError, DataError) as error:
        sentences.append(f"No warmup can be suggested from these records: {error}")
    return " ".join(sentences)


def _both(records: Sequence[Record], name: str) -> EarlyLate | None:
    return early_late(*curve(records, name), records[-1]["step"])


def _early_late_table(runs: Mapping[str, Sequence[Record]]) -> Table:
    rows: list[tuple[str | float | None, ...]] = []
    for size, label in NAMES.items():
        for run, records in runs.items():
            both = _both(records, size)
            level = early_late(*per_rate(records, size), records[-1]["step"]) if size in SIZES else None
            if both is not None:
                rows.append(
                    (label, run, both.early, both.late, _round(both.ratio), _round(level.ratio if level else None))
                )
    columns = ("measure", "run", "early", "late", "ratio", "ratio at equal rate")
    return Table(title="Early and late", columns=columns, rows=tuple(rows), note="all matrices together")


def _matrix_table(records: Sequence[Record]) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record["matrices"]))
    last, rows = records[-1]["step"], []
    for name in names:
        numbers: list[Any] = []
        for size in ("angle", "rrc", "snr"):
            both = early_late(*curve(records, size, name), last)
            numbers += [None, None] if both is None else [both.early, both.late]
        rows.append((name, *numbers))
    columns = ("matrix", "angle early", "angle late", "rrc early", "rrc late", "snr early", "snr late")
    return Table(title="By matrix", columns=columns, rows=tuple(rows), note="angles in rad")


def _figures(runs: Mapping[str, Sequence[Record]]) -> tuple[Figure, ...]:
    figures = []
    for size, label in NAMES.items():
        lines = []
        for run, records in runs.items():
            steps, values = curve(records, size)
            kept = range(0, len(steps), -(-len(steps) // POINTS) or 1)
            if steps:
                lines.append(Line(name=run, x=tuple(steps[i] for i in kept), y=tuple(values[i] for i in kept)))
        if lines:
            unit = f" ({UNITS[size]})" if size in UNITS else ""
            positive = all((value or 0) > 0 for line in lines for value in line.y)
            figures.append(
                Figure(
                    title=f"{label.capitalize()} by step",
                    x_label="step",
                    y_label=f"{label}{unit}",
                    log_x=True,
                    log_y=positive,
                    lines=tuple(lines),
                )
            )
    return tuple(figures)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
