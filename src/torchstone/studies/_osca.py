"""The data of the allocation study, and the tables and figure that it shows beside its verdicts.

`PRINTED` holds what the authors' notebook gives for its own split of BigCodeBench-Hard (70 training and 78
test problems, 10 configurations, 300 runs each): the first two rows to four digits, uniform mixing to three
and from 200 draws, where ours is the exact expectation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchstone.data.published import notice, published
from torchstone.errors import DataError
from torchstone.lab.study import Cell, Measurement
from torchstone.llm.allocation.populations import generate_table
from torchstone.llm.allocation.table import CountTable, read_table
from torchstone.llm.allocation.trial import by_budget, samples_to_match, spend
from torchstone.report.result import Figure, Line, PaperFigure, Series, Table
from torchstone.stats.resampled import resampled_estimate

Cells = Sequence[tuple[Cell, Measurement]]

DATA = "osca/bigcodebench_hard.csv"
BUDGETS = (2, 4, 8, 16, 32, 64, 128, 256)
PRINTED = {
    "mixed": (0.3906, 0.5079, 0.6056, 0.6933, 0.7559, 0.7992, 0.8415, 0.8761),
    "pure": (0.3788, 0.4680, 0.5709, 0.6389, 0.6895, 0.7389, 0.7850, 0.8236),
    "uniform": (0.356, 0.443, 0.521, 0.595, 0.670, 0.740, 0.800, 0.838),
}


def population(name: str, real: bool) -> CountTable:
    """The main table (published, or generated in its shape), or a control population; always the same one."""
    path = published(DATA)
    if name == "main" and real:
        if path is None:
            raise DataError(f"the study was prepared with the published table, which is not here. {notice(DATA)}")
        return read_table(path)
    kind = "complementary" if name == "main" else name
    return generate_table(kind, 148, 10, 300, np.random.default_rng([20241030, len(name)]))


def curve(policy: str, train: CountTable, test: CountTable) -> Series:
    """Test pass@C of a policy at every budget."""
    values = tuple(spend(policy, train, test, budget)[0].value for budget in BUDGETS)
    return Series(axes={"samples": tuple(map(float, BUDGETS))}, values=values)


def authors_split(table: CountTable, printed: bool) -> Table:
    """Test values on the table's own split, beside the printed figures, and the certificate of every fit."""
    columns = ["samples"]
    for name in ("OSCA", "train-selected pure", "uniform mixed"):
        columns += [name, "printed"] if printed else [name]
    rows: list[tuple[str | float | int | None, ...]] = []
    for index, figures in enumerate(by_budget(table.part("train"), table.part("test"), BUDGETS)):
        row: list[str | float | int | None] = [figures.budget]
        for key, value in (("mixed", figures.mixed), ("pure", figures.pure), ("uniform", figures.uniform)):
            row += [round(value, 4), PRINTED[key][index]] if printed else [round(value, 4)]
        gap = max(0.0, figures.upper_bound - figures.train_value)
        rows.append((*row, round(figures.train_value, 4), round(figures.upper_bound, 4), float(f"{gap:.1e}")))
    return Table(
        title="The table's own split: share of test problems solved",
        columns=(*columns, "train value", "upper bound", "gap"),
        rows=tuple(rows),
        note="Gap: no other split of the samples is better on the training problems by more than this.",
    )


def half_splits(cells: Cells) -> tuple[Table, Table]:
    """Mean over splits of every metric by arm; and how far the fits may be from optimal."""
    arms = list(dict.fromkeys(cell.arm.name for cell, _ in cells))
    means: list[tuple[str | float | int | None, ...]] = []
    gaps: list[tuple[str | float | int | None, ...]] = []
    for metric in cells[0][1].metrics:
        by_arm = [[m.metrics[metric] for cell, m in cells if cell.arm.name == arm] for arm in arms]
        means.append((metric, *(round(float(np.mean(values)), 4) for values in by_arm)))
        certified = [m.extra["gaps"][metric] for _, m in cells if m.extra["gaps"][metric] is not None]
        if certified:
            gaps.append((metric, float(f"{np.mean(certified):.1e}"), float(f"{np.max(certified):.1e}")))
    splits = len({cell.seed for cell, _ in cells})
    return (
        Table(title=f"Mean over {splits} half splits", columns=("metric", *arms), rows=tuple(means)),
        Table(title="Certificate of the fits", columns=("metric", "mean gap", "largest gap"), rows=tuple(gaps)),
    )


def gains(cells: Cells, arm: str, baseline: str) -> Table:
    """Mean gain by metric with the interval over splits that is safe for any training influence."""
    rows: list[tuple[str | float | int | None, ...]] = []
    for metric in cells[0][1].metrics:
        by_arm = {
            name: {cell.seed: m.metrics[metric] for cell, m in cells if cell.arm.name == name}
            for name in (arm, baseline)
        }
        common = sorted(set(by_arm[arm]) & set(by_arm[baseline]))
        if common:
            found = resampled_estimate([by_arm[arm][s] - by_arm[baseline][s] for s in common], 0.5)
            ends = [None if end is None else round(end, 4) for end in (found.low, found.high)]
            rows.append((metric, round(found.effect, 4), *ends))
    return Table(
        title=f"{arm} - {baseline}, conservative interval",
        columns=("metric", "gain", "low", "high"),
        rows=tuple(rows),
        note="Corrected resampled t over splits: allows for the choice of the fitted half, covers 96 to 100 %.",
    )


def curves(cells: Cells) -> Figure:
    """Held-out pass@C against the number of samples, one line per arm; the band holds 95 % of the splits."""
    lines = []
    for arm in dict.fromkeys(cell.arm.name for cell, _ in cells):
        found = [m.series["pass@C"].values for cell, m in cells if cell.arm.name == arm]
        values = np.array(found, dtype=np.float64)
        low, high = np.quantile(values, [0.025, 0.975], axis=0).tolist()
        x = tuple(map(float, BUDGETS))
        lines.append(Line(name=arm, x=x, y=tuple(values.mean(axis=0).tolist()), low=tuple(low), high=tuple(high)))
    return Figure(
        title="Held-out problems solved",
        x_label="samples per problem",
        y_label="share solved",
        log_x=True,
        lines=tuple(lines),
        note="Mean over half splits; bands hold 95 % of the splits, which share problems: no intervals.",
    )


def compute_saved(table: CountTable) -> tuple[PaperFigure, ...]:
    """ "x less compute" in both readings, on the table's own split."""
    train, test, most = table.part("train"), table.part("test"), BUDGETS[-1]
    figures = []
    for reference, chosen, samples in samples_to_match(train, test, most):
        name = table.configurations[chosen]
        ours = f"{samples} samples suffice: {most / samples:.1f}x" if samples else f"more than {most} samples"
        figures.append(
            PaperFigure(setting=f"{table.source}: {most} samples of {name}, {reference}", paper="", ours=ours)
        )
    return tuple(figures)
