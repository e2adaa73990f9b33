"""Interval for items (problems, documents) by a clustered bootstrap.

The estimate is the mean contrast over all items. What is resampled are clusters, since items of one problem
or document move together. With cluster sums T_g and sizes m_g the mean is ΣT / Σm, a ratio, because sizes
are random too.

Each end of the interval is the more cautious of two:

    percentile-t   quantiles of t* = (mean* - mean) / se* over resamples of clusters (Efron & Tibshirani 1993,
                   ch. 12); follows a skewed sampling distribution
    jackknife t    mean ± t quantile with G - 1 degrees of freedom × delete-one-cluster standard error;
                   steadier where contrasts have heavy tails or take few values

Alone, percentile-t covers 92-95 % with 10 to 50 clusters of such data, the t interval 85-95 %, and BCa
75-92 % (it has no studentisation). Together they cover 94-97 % on everything but very skewed contrasts;
docs/statistics.md has the table. One resample costs five dot products, so thousands are cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchstone.errors import StudyError
from torchstone.stats.contrasts import finite
from torchstone.stats.estimate import Estimate, check_level, identical_estimate, t_critical

MINIMUM_CLUSTERS = 10
_CHUNK = 2_000_000  # entries of the resampling matrix held at once


def clustered_estimate(
    values: ArrayLike,
    clusters: Sequence[int] | NDArray[np.int64] | None,
    generator: np.random.Generator,
    *,
    level: float = 0.95,
    margin: float = 0.0,
    resamples: int = 2000,
    resolution: float = 0.0,
) -> Estimate:
    """Mean of item contrasts with a clustered bootstrap interval.

    Args:
        values: (n,) one contrast per item (and seed).
        clusters: (n,) integer label of the cluster of each; None: every item is its own.
        generator: source of the resamples; the same state gives the same interval.
        level: nominal coverage of the two-sided interval.
        margin: kept in the estimate for the decision rule; the bootstrap gives no p-value.
        resamples: bootstrap resamples, at least 200.
        resolution: a spread up to this is rounding noise.

    Returns:
        Estimate with `n` the number of clusters. Below `MINIMUM_CLUSTERS` clusters there is no interval.

    Raises:
        StudyError: values that are not finite, lengths that differ, or too few resamples.
    """
    values_n = finite(values, "item contrasts")
    check_level(level)
    if resamples < 200:
        raise StudyError(f"a bootstrap interval needs at least 200 resamples (2000 is usual); given {resamples}.")
    sums_g, sizes_g = cluster_sums(values_n, clusters)
    count = sums_g.size
    effect = float(values_n.mean())
    if count < MINIMUM_CLUSTERS:
        note = f"{count} independent items; an interval needs at least {MINIMUM_CLUSTERS}"
        return Estimate(effect, None, None, level, count, margin=margin, method="none", note=note)
    means_g = sums_g / sizes_g
    if float(np.ptp(means_g)) <= max(resolution, 1e-12 * abs(effect)):
        return identical_estimate(effect, count, level, 1 - level, margin)
    jackknife = _jackknife_error(sums_g, sizes_g)
    error, t_star = _studentised(sums_g, sizes_g, effect, generator, resamples)
    tail = (1 - level) / 2
    low_t, high_t = np.quantile(t_star, [tail, 1 - tail], method="higher")
    half = t_critical(count, level) * jackknife
    estimate = Estimate(effect, None, None, level, count, jackknife * count**0.5, jackknife, margin)
    return replace(
        estimate,
        low=min(effect - float(high_t) * error, effect - half),
        high=max(effect - float(low_t) * error, effect + half),
        method="percentile-t",
    )


def cluster_sums(
    values: NDArray[np.float64], clusters: Sequence[int] | NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and sizes of the clusters, each (G,)."""
    if clusters is None:
        return values, np.ones(values.size)
    labels = np.asarray(clusters)
    if labels.shape != values.shape:
        raise StudyError(f"{values.size} contrasts but {labels.size} cluster labels were given; give one each.")
    _, codes = np.unique(labels, return_inverse=True)
    sizes = np.bincount(codes).astype(np.float64)
    return np.asarray(np.bincount(codes, weights=values), dtype=np.float64), sizes


def _jackknife_error(sums_g: NDArray[np.float64], sizes_g: NDArray[np.float64]) -> float:
    """Standard error of Σsums / Σsizes by leaving out one cluster at a time."""
    count = sums_g.size
    mean = sums_g.sum() / sizes_g.sum()
    without_g = (sums_g.sum() - sums_g) / (sizes_g.sum() - sizes_g)
    return float(np.sqrt((count - 1) / count * ((without_g - mean) ** 2).sum()))


def _studentised(
    sums_g: NDArray[np.float64],
    sizes_g: NDArray[np.float64],
    mean: float,
    generator: np.random.Generator,
    resamples: int,
) -> tuple[float, NDArray[np.float64]]:
    """Linearised standard error of the mean, and t* of every resample.

    With residuals e_g = T_g - mean * m_g a resample with cluster weights w has mean* - mean = Σwe / Σwm =:
    d and se*² = G/(G-1) Σw(e - d m)² / (Σwm)². A resample without spread has |t*| = infinity (a large
    finite number here).
    """
    count = sums_g.size
    residual_g = sums_g - mean * sizes_g
    correction = count / (count - 1)
    error = float(np.sqrt(correction * (residual_g**2).sum()) / sizes_g.sum())
    columns = np.stack([residual_g, sizes_g, residual_g**2, residual_g * sizes_g, sizes_g**2], axis=1)
    share = np.full(count, 1 / count)
    rows = max(1, _CHUNK // count)
    parts = []
    for start in range(0, resamples, rows):
        weights = generator.multinomial(count, share, size=min(rows, resamples - start)).astype(np.float64)
        e, m, ee, em, mm = (weights @ columns).T
        shift = e / m
        spread = np.sqrt(np.maximum(correction * (ee - 2 * shift * em + shift**2 * mm), 0)) / m
        flat = spread <= 1e-6 * error
        parts.append(np.where(flat, np.sign(shift) * 1e9, shift / np.where(flat, 1.0, spread)))
    return error, np.concatenate(parts)
