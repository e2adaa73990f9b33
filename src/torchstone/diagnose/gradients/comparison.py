"""How curves over layers vary, and how two of them differ.

    MAD = 1/(L−1) Σ_i |s_{i+1} − s_i|               of a mean curve: how uneven it is over the layers
    RD  = mean over layers of |s¹ − s²| / |s¹|      the authors' code; zeros of s¹ count as 1e-10
    signed difference of a layer = (s² − s¹) / s¹   the paper

Intervals come from resampling examples: paired examples (the same problems under both conditions) are drawn together. They
are percentile intervals of a ratio of means and need MINIMUM examples.

Shapes: n examples · l layers · m matrices · r resamples.

Pitfall: RD is an absolute difference and never 0 for finite samples; the signed curve with its intervals says what is
noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchstone.report.result import Table

RESAMPLES = 1000
MINIMUM = 10
LEVEL = 0.95
ZERO = 1e-10
TOP = 5


@dataclass(frozen=True, eq=False)
class Comparison:
    """One condition's curves against a reference's.

    Attributes:
        layers, matrices: labels of the axes.
        rd: relative difference, by matrix.
        top_layers: the layers with the largest relative difference, largest first, at most five, by matrix.
        signed_lm: (s² − s¹)/s¹ of every layer, fp64.
        low_lm, high_lm: ends of its 95 % interval; None below `MINIMUM` examples.
        paired: the conditions were resampled together.
    """

    layers: tuple[int, ...]
    matrices: tuple[str, ...]
    rd: dict[str, float]
    top_layers: dict[str, tuple[int, ...]]
    signed_lm: Tensor
    low_lm: Tensor | None
    high_lm: Tensor | None
    paired: bool

    def table(self, title: str) -> Table:
        """Signed difference of every layer and matrix, with its interval."""
        rows = []
        for i, layer in enumerate(self.layers):
            for j, matrix in enumerate(self.matrices):
                ends = (x[i, j].item() if x is not None else None for x in (self.low_lm, self.high_lm))
                numbers = (self.signed_lm[i, j].item(), *ends)
                rows.append((layer, matrix, *(None if x is None or x != x else round(x, 4) for x in numbers)))
        return Table(
            title=title,
            columns=("layer", "matrix", "relative difference", "low", "high"),
            rows=tuple(rows),
            note=f"95 % intervals over examples, {'paired' if self.paired else 'the two resampled apart'}.",
        )


def mean_curve(values_nlm: Tensor) -> Tensor:
    """Mean over examples [l, m], leaving out, matrix by matrix, examples with a NaN in a layer that has the matrix."""
    present_lm = (~values_nlm.isnan()).any(0)
    whole_nm = ~(values_nlm.isnan() & present_lm).any(1)
    kept_nlm = torch.where(whole_nm[:, None, :], values_nlm, 0.0)
    mean_lm = kept_nlm.sum(0) / whole_nm.sum(0)
    return torch.where(present_lm, mean_lm, torch.nan)


def variation(curve_l: Tensor) -> float:
    """MAD of a curve; layers without a value are left out; NaN for fewer than two."""
    known = curve_l[~curve_l.isnan()]
    return float(known.diff().abs().mean())


def thirds(curve_l: Tensor) -> tuple[float, float, float]:
    """MAD of the early, middle and late third of the neighbouring pairs."""
    steps = np.abs(np.diff(curve_l[~curve_l.isnan()].numpy()))
    early, middle, late = (float(part.mean()) if part.size else float("nan") for part in np.array_split(steps, 3))
    return early, middle, late


def relative_difference(first_l: Tensor, second_l: Tensor) -> Tensor:
    """|s¹ − s²|/|s¹| of every layer, zeros of s¹ replaced by 1e-10."""
    first_l = torch.where(first_l == 0, ZERO, first_l)
    return (first_l - second_l).abs() / first_l.abs()


def compare_curves(
    first_nlm: Tensor,
    second_nlm: Tensor,
    layers: tuple[int, ...],
    matrices: tuple[str, ...],
    *,
    paired: bool,
    seed: int = 0,
) -> Comparison:
    """Compare the mean curves of two conditions, the first of which is the reference."""
    first_lm, second_lm = mean_curve(first_nlm), mean_curve(second_nlm)
    rd: dict[str, float] = {}
    top: dict[str, tuple[int, ...]] = {}
    for j, matrix in enumerate(matrices):
        known_l = ~(first_lm[:, j].isnan() | second_lm[:, j].isnan())
        difference_l = relative_difference(first_lm[known_l, j], second_lm[known_l, j])
        rd[matrix] = float(difference_l.mean())
        present = [layer for layer, known in zip(layers, known_l.tolist(), strict=True) if known]
        order = difference_l.argsort(descending=True, stable=True).tolist()
        top[matrix] = tuple(present[i] for i in order[:TOP])
    low_lm, high_lm = _interval(first_nlm, second_nlm, paired, seed)
    signed_lm = second_lm / torch.where(first_lm == 0, ZERO, first_lm) - 1
    return Comparison(layers, matrices, rd, top, signed_lm, low_lm, high_lm, paired)


def _interval(first_nlm: Tensor, second_nlm: Tensor, paired: bool, seed: int) -> tuple[Tensor | None, Tensor | None]:
    """Percentile ends of the signed difference over resampled examples."""
    if min(len(first_nlm), len(second_nlm)) < MINIMUM:
        return None, None
    generator = np.random.default_rng(seed)
    weights = _weights(len(first_nlm), generator)
    first_rlm = _weighted_mean(first_nlm, weights)
    second_rlm = _weighted_mean(second_nlm, weights if paired else _weights(len(second_nlm), generator))
    signed_rlm = second_rlm / torch.where(first_rlm == 0, ZERO, first_rlm) - 1
    tail = (1 - LEVEL) / 2
    low_lm, high_lm = torch.quantile(signed_rlm, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low_lm, high_lm


def _weights(count: int, generator: np.random.Generator) -> Tensor:
    """How often each resample draws each example, [r, n]."""
    return torch.from_numpy(generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64))


def _weighted_mean(values_nlm: Tensor, weights_rn: Tensor) -> Tensor:
    """Means of the resamples [r, l, m]; numbers that are not finite have no weight."""
    known_nlm = (~values_nlm.isnan()).double()
    sums = torch.einsum("rn,nlm->rlm", weights_rn, values_nlm.nan_to_num(0.0))
    return sums / torch.einsum("rn,nlm->rlm", weights_rn, known_nlm)
