"""Fewer points for the same picture: seeds put on one grid, and largest-triangle-three-buckets down-sampling.

`on_one_grid` aligns the seeds of an arm. `largest_triangles` picks the points to keep: the curve is cut into
buckets, and in each the point is kept that spans the largest triangle with the point kept before and the mean
of the next bucket (Steinarsson 2013, "Downsampling Time Series for Visual Representation"), so spikes survive
where a stride would lose them.

Shapes: s seeds, p points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchstone.report.result import Series

AXES = ("tokens", "flops", "seconds", "steps")


@dataclass(frozen=True)
class Aligned:
    """Seeds of one arm at common points; nan where a seed has no value."""

    axes: dict[str, np.ndarray]
    values_sp: np.ndarray


def common_axes(series: Sequence[Series]) -> list[str]:
    """Axes that every series has, the known ones first, others in name order."""
    shared = set.intersection(*(set(one.axes) for one in series)) if series else set()
    return [axis for axis in AXES if axis in shared] + sorted(shared - set(AXES))


def on_one_grid(series: Sequence[Series]) -> Aligned:
    """Interpolate every seed linearly onto the points of the longest one; exact where the points agree.

    The key axis is steps, tokens or FLOPs, which seeds share; an axis that differs between seeds, such as
    seconds, is averaged over the seeds at each point. A seed that stopped early has no values after its end.
    """
    names = common_axes(series)
    key = next((axis for axis in ("steps", "tokens", "flops") if axis in names), names[0])
    tables = [_sorted_table(one, key, names) for one in series]
    grid_p = max((table[key] for table in tables), key=len)
    values_sp = np.stack([_onto(grid_p, table[key], table[""]) for table in tables])
    axes = {}
    for name in names:
        axis_sp = np.stack([_onto(grid_p, table[key], table[name]) for table in tables])
        axes[name] = grid_p if name == key else _mean_of_known(axis_sp)
    return Aligned(axes, values_sp)


def _sorted_table(series: Series, key: str, names: list[str]) -> dict[str, np.ndarray]:
    values = np.array([np.nan if value is None else value for value in series.values], dtype=float)
    count = min([len(values), *(len(series.axes[name]) for name in names)])
    columns = {name: np.asarray(series.axes[name][:count], dtype=float) for name in names}
    _, order = np.unique(columns[key], return_index=True)
    return {**{name: column[order] for name, column in columns.items()}, "": values[:count][order]}


def _onto(grid_p: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if len(x) == 0:
        return np.full(len(grid_p), np.nan)
    return np.interp(grid_p, x, y, left=np.nan, right=np.nan)


def _mean_of_known(values_sp: np.ndarray) -> np.ndarray:
    known_sp = ~np.isnan(values_sp)
    count_p = known_sp.sum(axis=0)
    total_p = np.where(known_sp, values_sp, 0.0).sum(axis=0)
    return np.divide(total_p, count_p, out=np.full(values_sp.shape[1], np.nan), where=count_p > 0)


def mean_and_range(values_sp: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, smallest and largest over the seeds that have a value, per point; nan where none has."""
    missing_sp = np.isnan(values_sp)
    low_p = np.where(missing_sp, np.inf, values_sp).min(axis=0)
    high_p = np.where(missing_sp, -np.inf, values_sp).max(axis=0)
    nothing_p = missing_sp.all(axis=0)
    low_p[nothing_p], high_p[nothing_p] = np.nan, np.nan
    return _mean_of_known(values_sp), low_p, high_p


def largest_triangles(x: np.ndarray, y: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` points of the curve, first and last among them. Missing values count as zero
    height."""
    count = len(x)
    if count <= most or most < 3:
        return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(int)
    y = np.nan_to_num(y)
    edges = np.linspace(1, count - 1, most - 1).astype(int)
    kept = [0]
    for bucket in range(most - 2):
        low, high = edges[bucket], edges[bucket + 1]
        following = slice(high, edges[bucket + 2] if bucket + 2 < len(edges) else count)
        ahead_x, ahead_y = x[following].mean(), y[following].mean()
        here = kept[-1]
        area = np.abs((x[here] - ahead_x) * (y[low:high] - y[here]) - (x[here] - x[low:high]) * (ahead_y - y[here]))
        kept.append(low + int(area.argmax()))
    kept.append(count - 1)
    return np.array(kept)
