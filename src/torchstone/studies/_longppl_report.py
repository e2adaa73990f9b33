"""Tables and figures of the LongPPL study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchstone.lab.study import Cell, Measurement
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Table

METRICS = (
    Metric(name="correlation", label="correlation of log perplexity on the chosen tokens with accuracy", better="lower"),
    Metric(name="size", label="its absolute value", better="higher"),
    Metric(name="spearman", label="Spearman's rank correlation", better="lower"),
    Metric(name="share", label="share of tokens that are chosen", better="neither"),
    Metric(name="copies", label="share of chosen tokens that are far copies", better="higher"),
    Metric(name="loss", label="loss of all tokens", unit="nats", better="lower"),
    Metric(name="far_loss", label="loss of the tokens that need far context", unit="nats", better="lower"),
    Metric(name="recall", label="share of those tokens that are ranked first", better="higher"),
    Metric(name="trained_longppl", label="trained models: correlation of log LongPPL with recall", better="lower"),
    Metric(name="trained_ppl", label="trained models: correlation of log perplexity with recall", better="neither"),
    Metric(name="trained_gap", label="the first minus the second", better="lower"),
    Metric(name="trained_gap_random", label="the first minus that of as many random tokens", better="lower"),
    Metric(name="trained_recall", label="trained models: recall of the best", better="higher"),
)  # fmt: skip
PAPER = (
    PaperFigure(
        setting="nine long-context models, GovReport and LongBench",
        paper="correlation with the benchmark: LongPPL about −0.96, perplexity about 0",
        note="nine models on one corpus; the evaluator may belong to a family that is tested",
    ),
    PaperFigure(
        setting="Llama-2-7B, PG-19 and Pile-arXiv",
        paper="LongCE is ahead of cross-entropy after 50 to 200 steps",
        note="at equal steps; windows add some 100 % to a step at 32k tokens",
    ),
)
Cells = Sequence[tuple[Cell, Measurement]]


def intervals_table(cells: Cells) -> tuple[Table, ...]:
    """For each seed and way to choose tokens the correlation, and its difference to perplexity's over models."""
    rows = []
    for cell, found in cells:
        interval = found.extra.get("difference")
        if interval:
            name, metrics = cell.arm.name, found.metrics
            rows.append((name, cell.seed, metrics["correlation"], metrics["spearman"], *interval, metrics["share"]))
    columns = ("tokens", "seed", "correlation", "Spearman", "against perplexity: low", "high", "share of tokens")
    note = (
        "low, high: 95 % interval of the correlation minus that of perplexity, bootstrapped over the models of the seed"
    )
    return (Table(title="Correlations by seed", columns=columns, rows=tuple(sorted(rows)), note=note),) if rows else ()


def robustness_tables(cells: Cells) -> tuple[Table, ...]:
    """The correlation over trunc_len, α and β, mean over seeds: one table per β."""
    swept = [np.array(found.extra["robustness"]) for _, found in cells if found.extra.get("robustness")]
    if not swept:
        return ()
    mean = np.mean(swept, axis=0)
    lengths, alphas, betas = (sorted(set(mean[:, column].tolist())) for column in range(3))
    tables = []
    for beta in reversed(betas):
        rows: list[tuple[str | float | int | None, ...]] = []
        for alpha in alphas:
            found = {row[0]: row for row in mean.tolist() if row[1] == alpha and row[2] == beta}
            cells_of = [value for length in lengths for value in (found[length][3], found[length][4])]
            rows.append((alpha, *cells_of))
        columns = ("α", *(f"K = {length:g}: {what}" for length in lengths for what in ("r", "share")))
        note = f"{len(swept)} seeds; r is the correlation with accuracy (0 where no token is key), share that of key tokens"
        tables.append(Table(title=f"Robustness at β = {beta:g}", columns=columns, rows=tuple(rows), note=note))
    return tuple(tables)


def scatter(cells: Cells) -> tuple[Figure, ...]:
    """Accuracy against log perplexity on the chosen tokens, the models of the first seed."""
    chosen = [(cell, found) for cell, found in cells if found.extra.get("values")]
    if not chosen:
        return ()
    first = min(cell.seed for cell, _ in chosen)
    lines = []
    for cell, found in chosen:
        if cell.seed == first:
            points = sorted(zip(found.extra["values"], found.extra["accuracy"], strict=True))
            x, y = (tuple(float(value) for value in axis) for axis in zip(*points, strict=True))
            lines.append(Line(name=cell.arm.name, x=x, y=y))
    label = "log perplexity on the chosen tokens (nats)"
    note = "one point per model, joined in order of perplexity; first seed"
    return (
        Figure(
            title="Metric and benchmark", x_label=label, y_label="accuracy on far copies", lines=tuple(lines), note=note
        ),
    )


def models_table(cells: Cells) -> tuple[Table, ...]:
    """The trained models of all seeds: what they recall, and their log perplexities, means over seeds."""
    runs = [found.extra["models"] for _, found in cells if found.extra.get("models")]
    if not runs:
        return ()
    rows: list[tuple[str | float | int | None, ...]] = []
    for models in zip(*runs, strict=True):
        columns = list(zip(*(model[1:] for model in models), strict=True))
        means = [None if None in column else float(np.mean(column)) for column in columns]
        rows.append((models[0][0], *means))
    columns_of = ("model", "recall", "log LongPPL", "log perplexity", "log perplexity of random tokens")
    note = f"mean over {len(runs)} seeds; recall is of far members, on documents of their own"
    return (Table(title="Trained models by window and width", columns=columns_of, rows=tuple(rows), note=note),)


def training_table(cells: Cells) -> tuple[Table, ...]:
    """Ways to weigh the loss: what they reach and what they cost, mean over seeds."""
    arms: dict[str, list[Measurement]] = {}
    for cell, found in cells:
        if "far_loss" in found.metrics:
            arms.setdefault(cell.arm.name, []).append(found)
    rows: list[tuple[str | float | int | None, ...]] = []
    for name, runs in arms.items():
        means = [float(np.mean([run.metrics[metric] for run in runs])) for metric in ("far_loss", "recall", "loss")]
        costs = [float(np.mean([run.flops or 0.0 for run in runs])), float(np.mean([run.tokens or 0 for run in runs]))]
        rows.append((name, *means, *costs, float(np.mean([run.extra["mean_weight"] for run in runs])), len(runs)))
    columns = ("loss", "loss of far tokens", "recall", "loss of all tokens", "FLOPs", "tokens", "mean weight", "seeds")
    note = "FLOPs of fine-tuning, windows included"
    return (
        (Table(title="Fine-tuning by weighted losses", columns=columns, rows=tuple(rows), note=note),) if rows else ()
    )
