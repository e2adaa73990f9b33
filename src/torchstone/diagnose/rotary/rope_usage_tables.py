"""Tables, heat maps and the figure of `torchstone.diagnose.rotary.rope_usage`.

Shapes: l layers · u query sub-heads · h heads · m frequency pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchstone.diagnose.rotary.frequency_usage import LayerUsage
from torchstone.diagnose.rotary.offset_heads import OffsetHead
from torchstone.report.finding import Heatmap
from torchstone.report.result import Figure, Line, Table

Usage = Sequence[LayerUsage]
Row = tuple[str | float | int | None, ...]
STILL = "does not turn"


def mean_share(usage: Usage, name: str) -> float:
    """Mean over all heads of `slow_share_u` or `fast_share_u`; heads whose queries or keys are all 0 have none."""
    return float(torch.cat([getattr(layer, name) for layer in usage]).nanmean())


def mean_energy(usage: Usage) -> tuple[float, float, float]:
    """Part of the squared norm in the slowest quarter, mean over layers that have one: queries, keys, values."""
    q, k, v = torch.tensor([layer.slow_energy for layer in usage], dtype=torch.float64).nanmean(dim=0).tolist()
    return q, k, v


def fastest_layer(usage: Usage) -> int:
    """The layer of the head with the largest share in the fastest quarter."""
    return max(usage, key=lambda layer: float(layer.fast_share_u.nan_to_num(-1.0).max())).layer


def rounded(value: float) -> float | None:
    """Five digits: these are measurements on a few texts. None for what is undefined."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def wavelength(frequency: float) -> float | None:
    """Tokens per turn; None where nothing turns."""
    return rounded(2 * math.pi / frequency) if frequency else None


def label(frequency: float) -> str:
    """A column of a heat map: radians per token and tokens per turn."""
    return f"{frequency:.3g} rad ({2 * math.pi / frequency:.3g} tokens)" if frequency else STILL


def offset_table(heads: Sequence[OffsetHead], usage: Usage, control: Usage, threshold: float) -> Table:
    """The main table: every offset head with its mass, the same head untrained, and its use of fast frequencies."""
    rows: list[Row] = []
    for head in heads:
        place = next(index for index, layer in enumerate(usage) if layer.layer == head.layer)
        layer, plain = usage[place], control[place]
        same = layer.q_um.shape[0] == layer.mass_oh.shape[1]
        per_head = (layer.fast_share_u, layer.slow_share_u, layer.aligned_u, layer.aligned_previous_u)
        rows.append((
            head.layer, head.head, head.offset, rounded(head.mass),
            rounded(float(plain.mass_oh[-head.offset, head.head])),
            *(rounded(float(values_u[head.head])) if same else None for values_u in per_head),
        ))  # fmt: skip
    return Table(
        title="Offset heads",
        columns=("layer", "head", "offset", "mass", "mass untrained", "fast share", "slow share", "q·k alignment",
                 "q·k alignment, token before"),
        rows=tuple(rows),
        note=f"Heads with at least {threshold:g} of their weight on one offset. {'' if rows else 'There are none. '}Shares: "
        "of the q·k usage, in the fastest and the slowest quarter of the frequencies.",
    )  # fmt: skip


def summary_table(usage: Usage, control: Usage, heads: int, control_heads: int) -> Table:
    """Model and untrained control, means over heads."""

    def column(found: Usage, count: int) -> tuple[float | int | None, ...]:
        q, k, v = mean_energy(found)
        shares = (mean_share(found, "slow_share_u"), mean_share(found, "fast_share_u"))
        return (*(rounded(value) for value in (*shares, q, k, v)), count)

    names = (
        "share of q·k usage, slowest quarter", "share of q·k usage, fastest quarter",
        "share of squared norm, slowest quarter, queries", "share of squared norm, slowest quarter, keys",
        "share of squared norm, slowest quarter, values (control)", "offset heads",
    )  # fmt: skip
    first = usage[0]
    even = first.quarter / len(first.frequencies_m)
    rows = tuple(zip(names, column(usage, heads), column(control, control_heads), strict=True))
    return Table(
        title="Summary",
        columns=("quantity", "model", "untrained"),
        rows=rows,
        note=f"Even use would give {even:.3g} for every share. Values do not turn: nothing is expected of their split.",
    )


def frequency_table(usage: Usage, control: Usage) -> Table:
    """Usage of every pair, by layer, mean over heads."""
    rows: list[Row] = []
    for layer, plain in zip(usage, control, strict=True):
        part_m = usage_shares(layer)
        plain_m = usage_shares(plain)
        for pair, frequency in enumerate(layer.frequencies_m.tolist()):
            rows.append((
                layer.layer, pair, rounded(frequency), wavelength(frequency), "yes" if frequency else "no",
                rounded(float(layer.q_um[:, pair].mean())), rounded(float(layer.k_um[:, pair].mean())),
                rounded(float(part_m[pair])), rounded(float(plain_m[pair])),
            ))  # fmt: skip
    return Table(
        title="Usage by frequency",
        columns=("layer", "pair", "rad/token", "tokens per turn", "turns", "q usage", "k usage", "share of q·k usage",
                 "share untrained"),
        rows=tuple(rows),
        note="Means over heads. Usage: token mean of the norm of the pair.",
    )  # fmt: skip


def usage_table(usage: Usage, control: Usage) -> Table:
    """Fast and slow shares and alignments of every (sub-)head."""
    rows: list[Row] = []
    for layer, plain in zip(usage, control, strict=True):
        columns = (
            layer.fast_share_u, plain.fast_share_u, layer.slow_share_u, plain.slow_share_u,
            layer.aligned_u, plain.aligned_u, layer.aligned_previous_u, plain.aligned_previous_u,
        )  # fmt: skip
        for head in range(layer.q_um.shape[0]):
            rows.append((layer.layer, head, *(rounded(float(values_u[head])) for values_u in columns)))
    return Table(
        title="Usage by head",
        columns=("layer", "head", "fast share", "fast share untrained", "slow share", "slow share untrained",
                 "q·k alignment", "q·k alignment untrained", "alignment, token before", "alignment, token before, untrained"),
        rows=tuple(rows),
        note="Differential attention has two sub-heads per head, in the model's own order.",
    )  # fmt: skip


def mass_table(usage: Usage, control: Usage) -> Table:
    """Attention mass of every head at every offset that is looked at."""
    offsets = range(usage[0].mass_oh.shape[0])
    rows: list[Row] = []
    for layer, plain in zip(usage, control, strict=True):
        best_h, _ = layer.best_offset()
        for head, best in enumerate(best_h.tolist()):
            masses = (rounded(float(layer.mass_oh[offset, head])) for offset in offsets)
            rows.append((layer.layer, head, best, *masses, rounded(float(plain.mass_oh[-best, head]))))
    return Table(
        title="Mass by offset",
        columns=(
            "layer",
            "head",
            "best offset",
            *(f"mass at {-offset}" for offset in offsets),
            "best offset, untrained",
        ),
        rows=tuple(rows),
    )


def ranking_table(usage: Usage) -> Table:
    """Pairs of every key head by falling product of usages."""
    rows = tuple(
        (layer.layer, group, " ".join(map(str, pairs)))
        for layer in usage
        for group, pairs in enumerate(layer.ranking().tolist())
    )
    return Table(
        title="Ranking of pairs",
        columns=("layer", "key head", "pairs, most used first"),
        rows=rows,
        note="By q usage × k usage, mean over the query heads that read the key head: the order in which to keep pairs.",
    )


def heatmaps(usage: Usage, control: Usage, layer_index: int, offset_heads: Sequence[int]) -> tuple[Heatmap, ...]:
    """Layer × frequency for queries, keys, values and untrained queries; head × frequency of one layer."""
    chosen = next(layer for layer in usage if layer.layer == layer_index)
    marked = f"Offset heads: {', '.join(map(str, offset_heads))}." if offset_heads else "No offset head."
    by_layer = [
        ("Queries: mean norm by layer and frequency", [layer.q_um for layer in usage], True),
        ("Keys: mean norm by layer and frequency", [layer.k_um for layer in usage], True),
        ("Control, values: mean norm by layer and pair", [layer.v_hn for layer in usage], False),
        ("Control, untrained queries: mean norm by layer and frequency", [layer.q_um for layer in control], True),
    ]
    maps = [
        _heatmap(
            title, "layer", [layer.layer for layer in usage], [x.mean(dim=0) for x in rows], usage if turn else None
        )
        for title, rows, turn in by_layer
    ]
    for name, norms_um in (("Queries", chosen.q_um), ("Keys", chosen.k_um)):
        title = f"{name} of layer {layer_index}: mean norm by head and frequency"
        maps.append(_heatmap(title, "head", range(norms_um.shape[0]), list(norms_um), [chosen], marked))
    return tuple(maps)


def _heatmap(
    title: str, y_label: str, y: Sequence[int], rows: Sequence[Tensor], turning: Usage | None, note: str = ""
) -> Heatmap:
    """Rows of unequal length are filled with nothing; columns are frequencies where all layers share them."""
    columns = max(len(row) for row in rows)
    names: tuple[str, ...] = tuple(f"pair {index}" for index in range(columns))
    if turning is not None and all(torch.equal(layer.frequencies_m, turning[0].frequencies_m) for layer in turning):
        names = tuple(label(frequency) for frequency in turning[0].frequencies_m.tolist())
    values = tuple((*(rounded(v) for v in row.tolist()), *[None] * (columns - len(row))) for row in rows)
    x_label = "pair" if turning is None else "frequency, radians per token (tokens per turn)"
    return Heatmap(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x=names,
        y=tuple(map(str, y)),
        values=values,
        unit="norm",
        note=note,
    )


def share_figure(usage: Usage, control: Usage) -> Figure:
    """Share of the q·k usage by pair, mean over heads and layers, with the range over layers."""
    lines = []
    for name, found in (("model", usage), ("untrained", control)):
        columns = min(len(layer.frequencies_m) for layer in found)
        parts_lm = torch.stack([usage_shares(layer)[layer.fastest_first_m][:columns] for layer in found])
        parts_lm = parts_lm[~parts_lm.isnan().any(dim=1)]  # layers without any usage
        if not len(parts_lm):
            continue
        lines.append(
            Line(
                name=name,
                x=tuple(range(columns)),
                y=tuple(parts_lm.mean(dim=0).tolist()),
                low=tuple(parts_lm.amin(dim=0).tolist()),
                high=tuple(parts_lm.amax(dim=0).tolist()),
            )
        )
    return Figure(
        title="Share of q·k usage by frequency",
        x_label="pair, fastest first",
        y_label="share",
        lines=tuple(lines),
        note="Mean over layers and heads; bands are the range over layers.",
    )


def usage_shares(layer: LayerUsage) -> Tensor:
    """Share of the q·k usage of every pair, mean over heads that use any, [m]."""
    product_um = layer.product_um
    return (product_um / product_um.sum(dim=1, keepdim=True)).nanmean(dim=0)  # 0 / 0 in a head that uses none
