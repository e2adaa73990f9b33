"""Paired contrasts: what one seed, or one item, says about two arms.

Both arms see the same seed (same data order, same initialisation where shapes allow) or the same item
(problem, document), so the noise they share cancels in the contrast. Two kinds:

    difference   arm - baseline             for numbers on a natural scale (accuracy, loss)
    log ratio    ln(arm / baseline)         for positive numbers that compare by factors (time, perplexity)

Resolution: subtracting two floats of size M leaves rounding noise of about eps * M. Contrasts smaller than
that are set to zero, so that arms which agree up to rounding cannot differ "significantly".

Pitfall: items that share a problem, a document or an author are not independent. Give every contrast the
label of its cluster; only clusters count as evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchstone.errors import StudyError

Kind = Literal["difference", "log ratio"]
K = TypeVar("K", int, str)
ROUNDING = 8 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Contrasts:
    """Paired contrasts of two arms.

    Attributes:
        values: (n,) contrasts, float64, finite.
        arm, baseline: (n,) the numbers they come from.
        units: n names for display (a seed, or seed and item).
        clusters: (n,) integer label of the independent unit that each contrast belongs to.
        resolution: differences up to this size are rounding noise.
    """

    values: NDArray[np.float64]
    arm: NDArray[np.float64]
    baseline: NDArray[np.float64]
    units: tuple[str, ...]
    clusters: NDArray[np.int64]
    resolution: float

    @property
    def n(self) -> int:
        """Number of independent units (clusters)."""
        return int(np.unique(self.clusters).size)


def paired(
    arm: ArrayLike,
    baseline: ArrayLike,
    kind: Kind = "difference",
    *,
    units: Sequence[str] | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> Contrasts:
    """Contrasts of two equally long sequences of numbers.

    Args:
        arm, baseline: (n,) numbers; position i of both saw the same seed or item.
        kind: `difference` or `log ratio`.
        units: names of the pairs; numbered if None.
        clusters: label of the independent unit of each pair; None: every pair is its own.

    Raises:
        StudyError: lengths differ, nothing is given, a number is not finite, or a log ratio meets a number
        <= 0.
    """
    arm_n = np.asarray(arm, dtype=np.float64)
    baseline_n = np.asarray(baseline, dtype=np.float64)
    names = tuple(units) if units is not None else tuple(str(index) for index in range(arm_n.size))
    _check(arm_n, baseline_n, names, kind)
    scale = float(max(np.abs(arm_n).max(), np.abs(baseline_n).max()))
    if kind == "difference":
        values = arm_n - baseline_n
        resolution = ROUNDING * scale
    else:
        values = np.log(arm_n) - np.log(baseline_n)
        resolution = ROUNDING * max(1.0, float(np.abs(np.log([arm_n, baseline_n])).max()))
    values = np.where(np.abs(values) <= resolution, 0.0, values)
    labels = cluster_codes(clusters) if clusters is not None else np.arange(arm_n.size, dtype=np.int64)
    if labels.size != values.size:
        raise StudyError(f"{values.size} pairs but {labels.size} cluster labels were given; give one label per pair.")
    return Contrasts(values, arm_n, baseline_n, names, labels, resolution)


def paired_seeds(arm: Mapping[int, float], baseline: Mapping[int, float], kind: Kind = "difference") -> Contrasts:
    """Contrasts by seed from two mappings seed -> number; both must hold the same seeds."""
    seeds = _same_keys(arm, baseline, "seeds")
    return paired([arm[s] for s in seeds], [baseline[s] for s in seeds], kind, units=[str(s) for s in seeds])


def paired_items(
    arm: Mapping[int, Mapping[str, float]],
    baseline: Mapping[int, Mapping[str, float]],
    kind: Kind = "difference",
    *,
    cluster_of: Callable[[str], Hashable] = lambda item: item,
) -> Contrasts:
    """Contrasts by seed and item, clustered by item.

    An item that several seeds measured is one independent unit: adding seeds does not make new problems.

    Args:
        arm, baseline: seed -> item id -> number; both must hold the same seeds and, per seed, the same items.
        kind: `difference` or `log ratio`.
        cluster_of: maps an item id to a larger unit (its document, its author).
    """
    arm_values: list[float] = []
    baseline_values: list[float] = []
    units: list[str] = []
    clusters: list[Hashable] = []
    for seed in _same_keys(arm, baseline, "seeds"):
        for item in _same_keys(arm[seed], baseline[seed], f"items of seed {seed}"):
            arm_values.append(arm[seed][item])
            baseline_values.append(baseline[seed][item])
            units.append(f"{item} (seed {seed})" if len(arm) > 1 else item)
            clusters.append(cluster_of(item))
    return paired(arm_values, baseline_values, kind, units=units, clusters=clusters)


def cluster_codes(labels: Sequence[Hashable]) -> NDArray[np.int64]:
    """(n,) integer codes of labels, numbered by first appearance."""
    codes: dict[Hashable, int] = {}
    return np.array([codes.setdefault(label, len(codes)) for label in labels], dtype=np.int64)


def finite(values: ArrayLike, what: str = "values") -> NDArray[np.float64]:
    """(n,) float64 copy of `values`; raises StudyError if it is empty, not one-dimensional or not finite."""
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise StudyError(f"{what} must be a sequence of at least one number; given shape {array.shape}.")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise StudyError(
            f"{bad} of {array.size} {what} are not finite. A cell without a finite number has failed: report "
            "it as failed instead of comparing it."
        )
    return array


def _same_keys(arm: Mapping[K, object], baseline: Mapping[K, object], what: str) -> list[K]:
    if set(arm) != set(baseline):
        only_arm = sorted(map(str, set(arm) - set(baseline)))[:5]
        only_baseline = sorted(map(str, set(baseline) - set(arm)))[:5]
        raise StudyError(
            f"arm and baseline must have the same {what}; only in the arm: {only_arm}, only in the baseline: "
            f"{only_baseline}. Run the missing cells, or report the claim as inconclusive."
        )
    return list(arm)


def _check(arm_n: NDArray[np.float64], baseline_n: NDArray[np.float64], names: tuple[str, ...], kind: Kind) -> None:
    if kind not in ("difference", "log ratio"):
        raise StudyError(f"unknown contrast {kind!r}; allowed: 'difference', 'log ratio'.")
    if arm_n.ndim != 1 or arm_n.shape != baseline_n.shape or arm_n.size != len(names):
        raise StudyError(
            f"paired numbers must be two sequences of one length; given shapes {arm_n.shape} and "
            f"{baseline_n.shape} with {len(names)} names."
        )
    for side, values in (("arm", arm_n), ("baseline", baseline_n)):
        finite(values, f"numbers of the {side}")
        if kind == "log ratio" and not (values > 0).all():
            worst = names[int(values.argmin())]
            raise StudyError(
                f"a log ratio needs numbers above 0; the {side} has {values.min():g} at {worst}. Use the "
                "contrast 'difference' for this metric."
            )
