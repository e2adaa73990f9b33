"""Metrics, curves and learned biases of the DAPE study, and the paper's numbers with ours beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torchstone.evals.extrapolation import Extrapolation
from torchstone.lab.study import Cell, Measurement
from torchstone.lab.training import Probe
from torchstone.nn.position.base import Offsets
from torchstone.nn.position.kerple import Kerple
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table

MULTIPLES = (1, 2, 4, 8)
LENGTHS = tuple(f"loss_{n}x" for n in MULTIPLES)
METRICS = (
    *(Metric(name=name, label=f"loss on the last tokens, {name[5:-1]} times the context", unit="nats/token")
      for name in LENGTHS),
    Metric(name="slope", label="slope of that loss", unit="nats per doubling"),
    Metric(name="foreign_gap", label="loss with foreign far context minus with own", unit="nats/token", better="higher"),
    Metric(name="validation_loss", label="validation loss", unit="nats/token"),
    Metric(name="accuracy", label="accuracy (recall arms: of recall)", better="higher"),
)  # fmt: skip
FLOPS = "Kerple with a feed-forward so wide that a token costs as much as with V2"
PARAMETERS = "Kerple with as many parameters as V2 has"
NOTES = (
    "All lengths predict the same last tokens of the same windows, each inside one document; arms and seeds share them.",
    "The paper reports perplexity averaged over whole contexts at 125M to 2.7B parameters, where longer contexts also have "
    "a smaller share of tokens with little context; the numbers beside it are differences of same-token losses.",
)


def probe(own: Extrapolation, foreign: Extrapolation, length: int, model: Any) -> Probe:
    """Numbers, per-window items and the curve of one trained model."""
    farthest = own.lengths[-1]
    metrics = {f"loss_{n // length}x": value for n, value in own.means.items()}
    metrics["slope"] = float(own.slopes_n.mean())
    metrics["foreign_gap"] = foreign.means[farthest] - own.means[farthest]
    axes = {"context length": tuple(map(float, own.lengths))}
    series = {"same-token loss": Series(axes=axes, values=tuple(own.means.values()))}
    return Probe(metrics, series=series, extra={"length": length, "bias": learned_bias(model, farthest)})


@torch.no_grad()
def learned_bias(model: Any, farthest: int) -> list[list[list[float]]]:
    """Kerple's bias of every layer and head at distances 0, 1, 2, 4 …; empty for other positions."""
    distance_n = torch.tensor([0, *(2**n for n in range(int(math.log2(farthest)) + 1))])
    kerples = [module for module in model.modules() if isinstance(module, Kerple)]
    return [kerple.bias(Offsets(distance_n[:, None], distance_n))[:, :, 0].tolist() for kerple in kerples]


def _by_arm(cells: Sequence[tuple[Cell, Measurement]]) -> dict[str, list[Measurement]]:
    rows: dict[str, list[Measurement]] = {}
    for cell, measurement in cells:
        rows.setdefault(cell.arm.name, []).append(measurement)
    return rows


def _mean(rows: Sequence[Measurement], metric: str) -> float | None:
    values = [row.metrics[metric] for row in rows if metric in row.metrics]
    return sum(values) / len(values) if values else None


def curve_table(cells: Sequence[tuple[Cell, Measurement]]) -> Table:
    """Mean same-token loss of every arm at every length, and the slope."""
    shown = (*LENGTHS, "slope", "foreign_gap")
    rows = tuple(
        (arm, *(_mean(found, metric) for metric in shown))
        for arm, found in _by_arm(cells).items()
        if _mean(found, "slope") is not None
    )
    heads = ("arm", *(f"{n}x" for n in MULTIPLES), "slope", "foreign - own")
    note = "nats per token, mean over seeds; slope in nats per doubling, over all lengths measured"
    return Table(title="Loss on the same last tokens", columns=heads, rows=rows, note=note)


def figures(cells: Sequence[tuple[Cell, Measurement]]) -> tuple[Figure, ...]:
    """Extrapolation curves of all arms, and the bias that Kerple learned with and without V2."""
    lines = []
    for arm, found in _by_arm(cells).items():
        curves = [one.series["same-token loss"] for one in found if "same-token loss" in one.series]
        if curves:
            columns = list(zip(*(curve.values for curve in curves), strict=True))
            lines.append(
                Line(
                    name=arm,
                    x=curves[0].axes["context length"],
                    y=tuple(sum(column) / len(column) for column in columns),
                    low=tuple(map(min, columns)),
                    high=tuple(map(max, columns)),
                )
            )
    curve = Figure(
        title="Length extrapolation",
        x_label="context length (tokens)",
        y_label="loss on the last tokens (nats)",
        log_x=True,
        lines=tuple(lines),
        note="mean and range over seeds",
    )
    return (curve, *_biases(cells))


def _biases(cells: Sequence[tuple[Cell, Measurement]]) -> tuple[Figure, ...]:
    found = []
    for arm in ("kerple", "kerple-v2"):
        first = next((one.extra["bias"] for cell, one in cells if cell.arm.name == arm and cell.seed == 0), None)
        if first:
            lines = [
                Line(name=f"layer {layer} head {head}", x=_distances(len(row)), y=tuple(row))
                for layer, heads in enumerate(first)
                for head, row in enumerate(heads)
            ]
            title = f"Bias that {arm} learned (seed 0)"
            found.append(Figure(title=title, x_label="distance", y_label="bias", log_x=True, lines=tuple(lines[:16])))
    return tuple(found)


def _distances(count: int) -> tuple[float, ...]:
    return (0.0, *(float(2**n) for n in range(count - 1)))


def beside(cells: Sequence[tuple[Cell, Measurement]]) -> tuple[PaperFigure, ...]:
    """The paper's perplexities as differences of log-perplexity, and ours."""
    rows = _by_arm(cells)

    def gain(arm: str, baseline: str, metric: str) -> str:
        one, other = _mean(rows.get(arm, ()), metric), _mean(rows.get(baseline, ()), metric)
        return "–" if one is None or other is None else f"{one - other:+.3f}"

    def paper(arm: float, baseline: float) -> str:
        return f"{math.log(arm / baseline):+.3f} ({baseline:g} → {arm:g}, 125M, trained on 512)"

    return (
        PaperFigure(
            setting="V2 − Kerple in range, nats", paper=paper(4.44, 4.57), ours=gain("kerple-v2", "kerple", "loss_1x")
        ),
        PaperFigure(
            setting="V2 − Kerple at 8x, nats", paper=paper(3.87, 6.80), ours=gain("kerple-v2", "kerple", "loss_8x")
        ),
        PaperFigure(
            setting="V2 − V1 at 8x, nats", paper=paper(3.87, 3.95), ours=gain("kerple-v2", "kerple-v1", "loss_8x")
        ),
        PaperFigure(
            setting="V2 − Kerple at equal FLOPs, 8x",
            paper="not shown",
            ours=gain("kerple-v2", "kerple-flops", "loss_8x"),
        ),
        PaperFigure(
            setting="ALiBi, trained on 128: V2 − V1",
            paper="V2 is worse (no number)",
            ours=gain("alibi-v2", "alibi-v1", "loss_8x"),
        ),
    )
