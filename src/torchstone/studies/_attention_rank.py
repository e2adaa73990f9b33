"""Metrics of the attention-rank study, its exact part, and its tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchstone.lab.study import Cell, Measurement
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table
from torchstone.studies._factor_descent import (
    DIAGONAL,
    RATE,
    SLOW,
    STEPS,
    factor_descent,
    random_starts,
    soft_threshold,
)

Cells = Sequence[tuple[Cell, Measurement]]
PRODUCTS = ("qk", "ov")
RATED = (0.1, 0.3, 0.5)  # values of λ whose imbalance rate is judged
SWEEP = tuple(round(0.1 * i, 1) for i in range(13))
RATE_STEPS = 100
RECORD = (0, 1, 5, 10, 20, 50, RATE_STEPS, 200, 500, STEPS)

METRICS = (
    *(Metric(name=f"effective_rank_{p}", label=f"effective rank of {p.upper()}", better="neither") for p in PRODUCTS),
    *(Metric(name=f"pseudo_rank_{p}", label=f"pseudo-rank of {p.upper()}", better="neither") for p in PRODUCTS),
    *(
        Metric(
            name=f"half_frobenius_over_nuclear_{p}", label=f"half Frobenius / nuclear of {p.upper()}", better="neither"
        )
        for p in PRODUCTS
    ),
    Metric(name="accuracy", label="accuracy", better="higher"),
    Metric(name="accuracy_cut", label="accuracy with QK cut to a quarter of its rank", better="higher"),
    Metric(name="validation_loss", label="validation loss", unit="nats/token", better="lower"),
    Metric(name="value_error", label="largest distance of a singular value from max(d - λ, 0)", better="lower"),
    Metric(name="rate_error", label="largest relative error of the imbalance rate 2ηλ", better="lower"),
)


def descend(seed: int, starts: int) -> Measurement:
    """The exact part: many random starts, all values of λ, against the closed form."""
    a_znr, b_zmr = random_starts(starts, seed)
    decay_l1 = torch.tensor(SWEEP).unsqueeze(1)
    target = torch.diag(torch.tensor(DIAGONAL))
    found = factor_descent(a_znr, b_zmr, target, rate=RATE, decay=decay_l1, record=RECORD)
    ends = found.values[-1]  # [λ, start, i]
    value_error, rates = 0.0, {}
    for index, lam in enumerate(SWEEP):
        settled = (torch.tensor(sorted(DIAGONAL, reverse=True)) - lam).abs() >= SLOW
        distance = (ends[index] - soft_threshold(lam)).abs()[:, settled]
        value_error = max(value_error, float(distance.max()))
        start, later = found.imbalance[0, index], found.imbalance[RECORD.index(RATE_STEPS), index]
        rates[lam] = float((start / later).log().mean()) / RATE_STEPS
    errors = [abs(rates[lam] / (2 * RATE * lam) - 1) for lam in RATED]
    gap = (found.half_frobenius - found.nuclear).mean(-1)
    return Measurement(
        metrics={"value_error": value_error, "rate_error": max(errors)},
        series={
            f"imbalance, λ = {lam:g}": Series(
                axes={"steps": tuple(map(float, RECORD))},
                values=tuple(found.imbalance[:, SWEEP.index(lam)].mean(-1).tolist()),
            )
            for lam in (0.0, *RATED)
        },
        extra={
            "rates": {f"{lam:g}": rates[lam] for lam in (0.0, *RATED)},
            "gap": {f"{lam:g}": gap[-1, SWEEP.index(lam)].item() for lam in (0.0, *RATED)},
            "ends": ends.mean(1).tolist(),
        },
    )


def closed_form() -> Measurement:
    """What the theory says of the same numbers."""
    return Measurement(
        metrics={"value_error": 0.0, "rate_error": 0.0},
        extra={"ends": [soft_threshold(lam).tolist() for lam in SWEEP]},
    )


def by_role(attention: float, rest: float) -> dict[str, float]:
    """Weight decay by role; embeddings are never decayed."""
    return {"default": rest, "attention_qk": attention, "attention_vo": attention, "embeddings": 0.0}


def overrides(attention: float, rest: float) -> tuple[str, ...]:
    """The same as overrides of a recipe."""
    return tuple(f"optimizer.weight_decay.{key}={value:g}" for key, value in by_role(attention, rest).items())


def decay_of(recipe: Mapping[str, Any]) -> tuple[float, float]:
    """Attention's λ and the rest's, of a recipe as plain data."""
    found = recipe["optimizer"]["weight_decay"]
    return found["attention_qk"], found["default"]


def rank_table(cells: Cells) -> Table:
    """Means over seeds of every trained arm, with the product of rate, steps and decay."""
    by_arm: dict[str, list[tuple[Cell, Measurement]]] = {}
    for cell, measurement in cells:
        if "recipe" in cell.arm.settings:
            by_arm.setdefault(cell.arm.name, []).append((cell, measurement))
    rows: list[tuple[str | float | int | None, ...]] = []
    shown = [metric for metric in METRICS if not metric.name.endswith("_error")]
    for arm, found in by_arm.items():
        recipe = found[0][0].arm.settings["recipe"]
        attention, rest = decay_of(recipe)
        budget = recipe["optimizer"]["learning_rate"] * recipe["budget"]["steps"]
        means = [_mean([m.metrics[metric.name] for _, m in found if metric.name in m.metrics]) for metric in shown]
        rows.append((arm, attention, rest, round(budget * attention, 3), round(budget * rest, 3), *means))
    rows.sort(key=lambda row: (row[2], row[1]))
    return Table(
        title="Decay and rank, means over seeds",
        columns=("arm", "attention λ", "rest λ", "η·steps·λ attention", "η·steps·λ rest", *(m.label for m in shown)),
        rows=tuple(rows),
        note="Decay shows where η·steps·λ (peak rate) is about 1 or more. The theory's equality, half Frobenius = nuclear, is of "
        "gradient descent; under AdamW the ratio need not fall as decay grows.",
    )


def exact_table(cells: Cells) -> Table:
    """Imbalance rates and gaps of gradient descent beside the theory's."""
    runs = [m for cell, m in cells if cell.arm.name == "descent"]
    rows: list[tuple[str | float | int | None, ...]] = []
    for lam in (0.0, *RATED):
        rate, gap = (_mean([m.extra[name][f"{lam:g}"] for m in runs]) for name in ("rates", "gap"))
        rows.append((lam, rate, round(2 * RATE * lam, 4), None if gap is None else round(gap, 12) + 0.0))
    return Table(
        title="Gradient descent on two factors",
        columns=("λ", "imbalance rate per step", "2ηλ", f"gap after {STEPS} steps"),
        rows=tuple(rows),
        note=f"Rate over the first {RATE_STEPS} steps, mean over starts; η = {RATE:g}. Gap: half Frobenius - nuclear norm. "
        "A step of finite size multiplies the imbalance by about (1 - ηλ)², a little less than e^(-2ηλ).",
    )


def threshold_figure(cells: Cells) -> Figure:
    """Where the singular values end, against λ: descent and closed form."""
    lines = []
    for arm in ("descent", "closed form"):
        runs = [m.extra["ends"] for cell, m in cells if cell.arm.name == arm]
        ends_li = torch.tensor(runs).mean(0)
        lines += [
            Line(name=f"{arm}, d = {d:g}", x=SWEEP, y=tuple(round(v, 6) for v in ends_li[:, i].tolist()))
            for i, d in enumerate(sorted(DIAGONAL, reverse=True))
        ]
    return Figure(
        title=f"Singular values after {STEPS} steps",
        x_label="λ",
        y_label="singular value",
        lines=tuple(lines),
        note="A mode with d = λ is slow and has a little left.",
    )


def beside(cells: Cells) -> tuple[PaperFigure, ...]:
    """The paper's findings and our means over seeds."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for cell, measurement in cells:
        found.setdefault(cell.arm.name, []).append(measurement.metrics)

    def path(metric: str) -> str:
        means = [
            _mean([row[metric] for row in found.get(arm, ()) if metric in row])
            for arm in ("attention-0", "attention-low", "attention-high")
        ]
        return " → ".join("–" if mean is None else f"{mean:.3g}" for mean in means)

    adam = "theirs: as decay grows, the gap goes to 0; ours is AdamW, which the theorem does not cover"
    return (
        PaperFigure(
            setting="rank of QK as attention decay grows",
            paper="falls (2-layer transformer on recall; language model on the Pile; ViT)",
            ours=f"effective rank {path('effective_rank_qk')}",
        ),
        PaperFigure(setting="rank of OV as attention decay grows", paper="falls", ours=path("effective_rank_ov")),
        PaperFigure(
            setting="half Frobenius / nuclear of QK as attention decay grows",
            paper="to 1",
            ours=path("half_frobenius_over_nuclear_qk"),
            note=adam,
        ),
        PaperFigure(
            setting="quality without attention decay",
            paper="better perplexity on the Pile (numbers in a table over decays; 5 seeds)",
            ours=f"accuracy {path('accuracy')}",
            note="ours: another task, and a model a thousand times smaller",
        ),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(f"{sum(values) / len(values):.5g}") if values else None
