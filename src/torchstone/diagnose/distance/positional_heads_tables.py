"""Tables, heat maps and curves of the finding on distance heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchstone.diagnose.distance.ablation import AblationReport, Increase
from torchstone.diagnose.distance.heads import HeadTable
from torchstone.diagnose.subject import Head
from torchstone.report.finding import Heatmap
from torchstone.report.result import Figure, Line, Table

SHOWN = 5  # heads with a curve
MAPPED = 2  # heads with a heat map
TOPS = (0.05, 0.1)


def head_tables(
    trained: HeadTable, untrained: HeadTable, top: float, report: AblationReport | None
) -> tuple[Table, ...]:
    """One row per head; the distribution of shifts beside the untrained model's; the ablation."""
    tables = (_heads(trained, untrained, top), _distribution(trained, untrained))
    return tables if report is None else (*tables, _ablation(report))


def _heads(trained: HeadTable, untrained: HeadTable, top: float) -> Table:
    chosen = {head: rank for rank, head in enumerate(trained.selected(top), start=1)}
    control = dict(zip(untrained.heads(), untrained.column("score").tolist(), strict=True))
    names = ("score", "z", "far", "mean_distance", "share_beyond")
    columns = [trained.column(name).tolist() for name in names]
    rows = []
    for number, (layer, head) in enumerate(trained.heads()):
        offset = trained.of(layer).offset(head)
        numbers = [finite(column[number]) for column in columns]
        rows.append(
            (layer, head, *numbers, None if offset is None else -offset, chosen.get((layer, head)),
             finite(control[layer, head]))
        )  # fmt: skip
    return Table(
        title="heads",
        columns=(
            "layer", "head", "shift", "z", "far", "mean distance", f"share beyond {trained.length // 4} tokens",
            "offset head", "distance head", "shift untrained",
        ),
        rows=tuple(rows),
        note="distance head: rank among the selected heads; offset head: the offset that holds 90 % of its attention",
    )  # fmt: skip


def _distribution(trained: HeadTable, untrained: HeadTable) -> Table:
    def column(table: HeadTable) -> list[float | str | None]:
        score, z = table.column("score"), table.column("z")
        known = score[~score.isnan()]
        quantiles = [finite(known.quantile(share)) if len(known) else None for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        lists = [", ".join(f"{layer}.{head}" for layer, head in table.selected(share)) for share in TOPS]
        return [*quantiles, float((score > 0).sum()), float((z > 3).sum()), *lists]

    names = (
        "lowest shift", "lower quartile", "median", "upper quartile", "highest shift", "heads with shift above 0",
        "heads with z above 3", *(f"top {share:.0%}" for share in TOPS),
    )  # fmt: skip
    return Table(
        title="distribution",
        columns=("", "model", "untrained"),
        rows=tuple(zip(names, column(trained), column(untrained), strict=True)),
    )


def _ablation(report: AblationReport) -> Table:
    def row(name: str, of: Increase) -> tuple[str | float | None, ...]:
        quantiles = [of.quantile(share) for share in (0.05, 0.5, 0.95)]
        return (name, of.plain, of.chosen, *quantiles, of.lowest, of.percentile)

    window = f", window {report.window}" if report.window is not None else ""
    return Table(
        title="ablation",
        columns=(
            "tokens", "loss", "rise without distance heads", "random draws 5 %", "random draws median",
            "random draws 95 %", "rise without lowest-shift heads", "share of draws below",
        ),
        rows=(row("first quarter", report.early), row("last quarter", report.late)),
        note=f"{report.mode}{window}; nats per token; {len(report.late.random)} draws of as many heads of the same layers",
    )  # fmt: skip


def heatmaps(table: HeadTable, chosen: Sequence[Head]) -> tuple[Heatmap, ...]:
    """Shift by layer and head, and dimension by distance for the first distance heads."""
    widest = max(len(scored.score_h) for scored in table.layers)
    by_head = Heatmap(
        title="Shift by layer and head",
        x_label="head",
        y_label="layer",
        x=tuple(str(head) for head in range(widest)),
        y=tuple(str(scored.layer) for scored in table.layers),
        values=tuple(
            tuple(_numbers(scored.score_h)) + (None,) * (widest - len(scored.score_h)) for scored in table.layers
        ),
        diverging=True,
        note="above 0: slow pairs take over with distance",
    )
    return (by_head, *(_contributions(table, head) for head in chosen[:MAPPED]))


def _contributions(table: HeadTable, head: Head) -> Heatmap:
    parts_mz = table.of(head[0]).parts_hzm[head[1]].T
    return Heatmap(
        title=f"Parts of the logit in head {head[0]}.{head[1]}",
        x_label="distance in tokens",
        y_label="frequency pair (0 is the fastest)",
        x=tuple(bucket_names(table.edges)),
        y=tuple(str(pair) for pair in range(len(parts_mz))),
        values=tuple(tuple(_numbers(row)) for row in parts_mz),
        diverging=True,
        note="mean of q·k over pairs of tokens, weighted by attention, before the factor 1/√d",
    )


def centre_figure(trained: HeadTable, untrained: HeadTable, chosen: Sequence[Head]) -> tuple[Figure, ...]:
    """Mean centre of dimension against distance for the first distance heads, all heads, and the untrained model."""
    x = tuple(float(edge) for edge in trained.edges)
    lines = [
        Line(name=f"head {layer}.{head}", x=x, y=tuple(_numbers(trained.of(layer).centre_hz[head])))
        for layer, head in chosen[:SHOWN]
    ]
    for name, table in (("all heads", trained), ("all heads, untrained", untrained)):
        every = torch.cat([scored.centre_hz for scored in table.layers])
        lines.append(Line(name=name, x=x, y=tuple(_numbers(every.nanmean(0)))))
    return (
        Figure(
            title="Centre of dimension against distance",
            x_label="distance in tokens (lower edge of the bucket)",
            y_label="centre of dimension (0 fast … 1 slow)",
            log_x=True,
            lines=tuple(lines),
        ),
    )


def bucket_names(edges: Sequence[int]) -> list[str]:
    """`1`, `2–3`, `4–7`, …, `64+`."""
    closed = [f"{a}" if b - a == 1 else f"{a}–{b - 1}" for a, b in zip(edges, edges[1:], strict=False)]
    return [*closed, f"{edges[-1]}+"]


def finite(value: float | Tensor) -> float | None:
    """A number, or None where there is none."""
    number = float(value)
    return number if math.isfinite(number) else None


def _numbers(values: Tensor) -> list[float | None]:
    return [finite(value) for value in values]
