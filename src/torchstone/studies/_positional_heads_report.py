"""Positional heads' study: numbers of an arm from a seed's record, and what all seeds say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from torchstone.report.result import Figure, Line, Metric, PaperFigure, Table

METRICS = (
    Metric(name="distant_drop", label="accuracy lost on distant questions", better="neither"),
    Metric(name="recall_drop", label="accuracy lost on all questions", better="neither"),
    Metric(name="window_drop", label="accuracy lost on distant questions, heads kept to a window", better="neither"),
    Metric(name="text_rise", label="rise of the loss on text", unit="nats/token", better="neither"),
    Metric(name="spearman", label="rank correlation of score and single-head accuracy loss", better="neither"),
    Metric(name="partial_distance", label="the same, given mean distance", better="neither"),
    Metric(name="partial_retrieval", label="the same, given the retrieval score", better="neither"),
    Metric(name="recall_accuracy", label="accuracy without ablation", better="higher"),
)
PERMUTATIONS = 200
LEAST_CORRELATION, LEVEL = 0.4, 0.05
Record = Mapping[str, Any]


def metrics_of(record: Record, rule: str, quantile: float | None = None) -> dict[str, float]:
    """Numbers of one way to choose heads: a score, `lowest`, or `random` with a quantile (None: the mean)."""
    mean, window = (record["rises"][mode][rule] for mode in ("mean", "window"))
    found = {
        "distant_drop": _of_draws(mean["distant"], quantile),
        "recall_drop": _of_draws(mean["recall"], quantile),
        "window_drop": _of_draws(window["distant"], quantile),
        "text_rise": _of_draws(mean["text"], quantile),
        "recall_accuracy": 1 - record["plain"]["recall"],
    }
    columns, drops = record["columns"], record["single"]
    if rule == "random":
        found |= _by_chance(columns, drops, quantile)
    if rule in columns:
        found["spearman"] = spearman(columns[rule], drops)
        if rule != "mean_distance":
            found["partial_distance"] = spearman(columns[rule], drops, columns["mean_distance"])
        if rule != "retrieval":
            found["partial_retrieval"] = spearman(columns[rule], drops, columns["retrieval"])
    return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}


def _of_draws(value: float | Sequence[float], quantile: float | None) -> float:
    return float(np.mean(value) if quantile is None else np.quantile(value, quantile))


def _by_chance(
    columns: Mapping[str, Sequence[float]], drops: Sequence[float], quantile: float | None
) -> dict[str, float]:
    """Correlations of shifts that were given to other heads of the seed at random."""
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(columns["shift"]) for _ in range(PERMUTATIONS)]
    given = {
        "spearman": (),
        "partial_distance": (columns["mean_distance"],),
        "partial_retrieval": (columns["retrieval"],),
    }
    return {
        name: _of_draws([spearman(scores, drops, *others) for scores in drawn], quantile)
        for name, others in given.items()
    }


def spearman(scores: ArrayLike, drops: ArrayLike, *given: ArrayLike) -> float:
    """Rank correlation of two lists, after the ranks of others are taken out of both; 0 where one is constant."""
    x_n, y_n = (
        _residual(stats.rankdata(values), [stats.rankdata(other) for other in given]) for values in (scores, drops)
    )
    size = float(np.linalg.norm(x_n) * np.linalg.norm(y_n))
    return float(x_n @ y_n) / size if size > 1e-9 else 0.0


def _residual(rank_n: NDArray[np.float64], given: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    design = np.column_stack([np.ones_like(rank_n), *given])
    return rank_n - design @ np.linalg.lstsq(design, rank_n, rcond=None)[0]


def p_value(correlation: float, count: int, given: int = 0) -> float:
    """Two-sided p of a (partial) correlation of `count` points."""
    freedom = count - 2 - given
    if freedom < 1 or abs(correlation) >= 1:
        return 1.0 if freedom < 1 else 0.0
    return float(2 * stats.t.sf(abs(correlation) * math.sqrt(freedom / (1 - correlation**2)), freedom))


def pooled(records: Mapping[int, Record], name: str) -> list[float]:
    """One number per head, over all seeds."""
    return [value for record in records.values() for value in (record["columns"].get(name) or record[name])]


def rule_table(records: Mapping[int, Record]) -> Table:
    """The rule that was written beforehand, by seed, and its word over all seeds."""
    rows: list[tuple[str | float, ...]] = []
    for seed, record in records.items():
        rises = record["rises"]["mean"]
        draws = np.quantile(rises["random"]["distant"], [0.25, 0.75, 0.95]).tolist()
        rho = spearman(record["columns"]["shift"], record["single"])
        rows.append((f"seed {seed}", rises["shift"]["distant"], *draws, rises["lowest"]["distant"], rho))
    means = [float(np.mean([row[i] for row in rows])) for i in range(1, 6)]
    drops = pooled(records, "single")
    rho = spearman(pooled(records, "shift"), drops)
    p = p_value(rho, len(drops))
    word = "inconclusive"
    if means[0] > means[3] and rho >= LEAST_CORRELATION and p < LEVEL:
        word = "holds"
    elif means[1] <= means[0] <= means[2]:
        word = "fails"
    rows.append(("all seeds", *means, rho))
    return Table(
        title="The rule written beforehand",
        columns=(
            "",
            "top shift",
            "random 25 %",
            "random 75 %",
            "random 95 %",
            "lowest shift",
            "Spearman of single heads",
        ),
        rows=tuple(rows),
        note=(
            f"Accuracy lost on distant questions. The rule says {word}: it holds if the loss exceeds the 95th percentile of "
            f"random draws and the pooled correlation is at least {LEAST_CORRELATION} (p < {LEVEL}; here p = {p:.2g}), and "
            "fails if the loss lies in the central half of the draws."
        ),
    )


def explanations_table(records: Mapping[int, Record]) -> Table:
    """Three scores as explanations of what a single head is worth, each alone and given the other two."""
    names = {"shift": "shift", "mean_distance": "mean distance", "retrieval": "retrieval score"}
    drops = pooled(records, "single")
    rows = []
    for name, words in names.items():
        others = [pooled(records, other) for other in names if other != name]
        alone = spearman(pooled(records, name), drops)
        partial = spearman(pooled(records, name), drops, *others)
        text = spearman(pooled(records, name), pooled(records, "single_text"))
        rows.append((words, alone, p_value(alone, len(drops)), partial, p_value(partial, len(drops), 2), text))
    return Table(
        title="Three explanations",
        columns=(
            "score",
            "Spearman with recall lost",
            "p",
            "given the other two",
            "p (partial)",
            "Spearman with text lost",
        ),
        rows=tuple(rows),
        note=f"{len(drops)} heads of {len(records)} seeds pooled; heads of one seed are not independent, so p is a rough guide",
    )


def heads_table(records: Mapping[int, Record]) -> Table:
    """Every head: its scores, those of the untrained model, and what it alone is worth."""
    rows = []
    for seed, record in records.items():
        columns = record["columns"]
        for i, (layer, head) in enumerate(record["heads"]):
            scores = [columns[name][i] for name in ("shift", "z", "far", "mean_distance", "retrieval")]
            rows.append((seed, f"{layer}.{head}", *map(_finite, scores), record["untrained"][i], record["single"][i],
                         record["single_text"][i]))  # fmt: skip
    return Table(
        title="Heads",
        columns=(
            "seed", "head", "shift", "z", "far", "mean distance", "retrieval", "shift untrained", "recall lost", "text rise",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def depth_figure(records: Mapping[int, Record]) -> Figure:
    """Accuracy by distance of the answer: whole model, without the top heads, without random ones."""
    gaps = [name for name in next(iter(records.values()))["plain"] if name.startswith("gap ")]
    x = tuple(float(name.removeprefix("gap ")) for name in gaps)

    def line(label: str, rule: str | None) -> Line:
        rows = []
        for record in records.values():
            rises = record["rises"]["mean"].get(rule, {})
            rows.append([1 - record["plain"][gap] - float(np.mean(rises.get(gap, 0.0))) for gap in gaps])
        columns = list(zip(*rows, strict=True))
        return Line(
            name=label, x=x, y=tuple(sum(c) / len(c) for c in columns),
            low=tuple(map(min, columns)), high=tuple(map(max, columns)),
        )  # fmt: skip

    return Figure(
        title="Recall by distance of the answer", x_label="distance in tokens (lower edge)", y_label="accuracy", log_x=True,
        lines=(
            line("whole model", None), line("without top-shift heads", "shift"),
            line("without lowest-shift heads", "lowest"), line("without random heads", "random"),
        ),
        note="mean and range over seeds; heads are mean-ablated",
    )  # fmt: skip


def paper_figures(records: Mapping[int, Record]) -> tuple[PaperFigure, ...]:
    """What others report, with ours beside it."""
    plain = float(np.mean([1 - record["plain"]["distant"] for record in records.values()]))
    lost = {
        rule: float(np.mean([np.mean(record["rises"]["mean"][rule]["distant"]) for record in records.values()]))
        for rule in ("shift", "retrieval", "random")
    }
    return (
        PaperFigure(
            setting="long inputs without the top heads", paper="pivotal (abstract; no number was open to us)",
            ours=f"{plain:.2f} → {plain - lost['shift']:.2f} (distant recall)",
        ),
        PaperFigure(
            setting="needle without 87 retrieval heads / random ones", paper="1.00 → 0.00 / 1.00 (arXiv 2606.21249, 7–8B)",
            ours=f"{plain:.2f} → {plain - lost['retrieval']:.2f} / {plain - lost['random']:.2f}",
            note="ours: heads of the highest retrieval score; an independent paper",
        ),
    )  # fmt: skip
