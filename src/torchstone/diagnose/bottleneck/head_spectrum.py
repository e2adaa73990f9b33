"""Spectrum of the output matrix: is the whole rank of the head in use, or has it collapsed to few directions?

Singular values σ of W [v, d], m = min(v, d) of them, and p = σ / Σσ:

    entropy −Σ p ln p · KL to uniform ln m − entropy (small: flat, large: spiky; "singular entropy" in arXiv 2404.07647) ·
    effective rank exp(entropy) · stable rank Σσ² / σ₁² · top share σ₁ / Σσ

For v ≫ d they are roots of the eigenvalues of the d × d Gram matrix, made in fp64 from slices of rows: values below about
1e-7 σ₁ are lost, and the spectrum of 250 thousand tokens costs seconds.

Shapes: v vocabulary · d width · m = min(v, d).

Pitfalls: with tied embeddings the spectrum is as much the input's as the output's. Rows of padding tokens, which training
never touches, must be left out (`Subject.head_weight` does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.diagnose.spectra import stable_rank
from torchstone.diagnose.subject import Subject
from torchstone.errors import DataError
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, PaperFigure, Table

MUCH, MANY = (
    8,
    4096,
)  # times as many rows as columns, and rows at all, that make the Gram matrix worth its loss of digits
ROWS_AT_ONCE = 1 << 14
LABELS = {
    "entropy": "entropy (nats)",
    "kl_uniform": "KL to uniform (nats)",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "top_share": "top share",
}
PAPER = (
    PaperFigure(
        setting="KL to uniform of the head's singular values (Pythia)",
        paper="falls, then rises late in training in models up to 410M; not in larger ones",
        note="a trajectory: `saturation` shows it for a series of checkpoints",
    ),
)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Numbers of one matrix.

    Attributes:
        values_m: fp64, largest first.
        entropy, kl_uniform: nats.
        effective_rank, stable_rank: directions, from 1 to m.
        top_share: σ₁ / Σσ.
    """

    values_m: Tensor
    entropy: float
    kl_uniform: float
    effective_rank: float
    stable_rank: float
    top_share: float

    def metrics(self) -> dict[str, float]:
        """The scalars by name, as a training callback logs them."""
        names = ("entropy", "kl_uniform", "effective_rank", "stable_rank", "top_share")
        return {name: getattr(self, name) for name in names}


def singular_values(weight_vd: Tensor) -> Tensor:
    """Singular values, fp64 [min(v, d)], largest first.

    Raises:
        DataError: the matrix is empty or holds a number that is not finite.
    """
    if weight_vd.dim() != 2 or not weight_vd.numel():
        raise DataError(f"a spectrum needs a matrix with entries; the shape given is {list(weight_vd.shape)}.")
    require_finite_rows(weight_vd)
    tall_vd = weight_vd if weight_vd.shape[0] >= weight_vd.shape[1] else weight_vd.T
    if tall_vd.shape[0] < max(MANY, MUCH * tall_vd.shape[1]):
        return torch.linalg.svdvals(tall_vd.double())
    return torch.linalg.eigvalsh(gram_matrix(tall_vd)).clamp(min=0).sqrt().flip(0)


def require_finite_rows(weight_vd: Tensor) -> None:
    """Raises DataError for an output matrix with a number that is not finite; names the first such row."""
    bad_v = ~weight_vd.isfinite().all(1)
    if bool(bad_v.any()):
        row = int(bad_v.nonzero()[0])
        raise DataError(
            f"row {row} of the output matrix is not finite; the checkpoint is damaged or its training diverged."
        )


def gram_matrix(tall_vd: Tensor) -> Tensor:
    """WᵀW, fp64 [d, d], from slices of rows, so that no second W in fp64 is made."""
    gram_dd = torch.zeros(tall_vd.shape[1], tall_vd.shape[1], dtype=torch.float64, device=tall_vd.device)
    for rows_vd in tall_vd.split(ROWS_AT_ONCE):
        precise_vd = rows_vd.double()
        gram_dd.addmm_(precise_vd.T, precise_vd)
    return gram_dd


def spectrum(weight_vd: Tensor) -> Spectrum:
    """All numbers of a matrix.

    Raises:
        DataError: the matrix is zero, empty or not finite.
    """
    values_m = singular_values(weight_vd)
    if not float(values_m[0]) > 0:
        raise DataError("the matrix is zero, so its singular values have no distribution; load trained weights.")
    share_m = values_m / values_m.sum()
    entropy = float(torch.special.entr(share_m).sum())
    return Spectrum(
        values_m=values_m,
        entropy=entropy,
        kl_uniform=math.log(len(values_m)) - entropy,
        effective_rank=math.exp(entropy),
        stable_rank=float(stable_rank(values_m)),
        top_share=float(share_m[0]),
    )


def random_spectrum(rows: int, columns: int, seed: int = 0) -> Spectrum:
    """Of a matrix of independent normal numbers: what this shape gives without any structure."""
    return spectrum(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float32))


def head_spectrum_finding(subject: Subject, *, seed: int = 0) -> Finding:
    """Spectrum of a model's output matrix next to a random matrix of its shape and to the model untrained.

    Args:
        subject: a model with a linear head.
        seed: of both controls.

    Raises:
        ConfigError: the model has no output matrix.
        DataError: the matrix is zero or not finite.
    """
    weight_vd = subject.head_weight()
    ours = spectrum(weight_vd)
    controls = {
        "random matrix": random_spectrum(weight_vd.shape[0], weight_vd.shape[1], seed),
        "untrained": spectrum(subject.untrained(seed).head_weight()),
    }
    tied = "tied to the token embedding, which it is as well" if subject.tied else "not tied"
    random = controls["random matrix"]
    return Finding(
        analysis="head-spectrum",
        title="Spectrum of the output matrix",
        question="How many directions does the output head use?",
        subject=subject.describe(),
        answer=(
            f"The output matrix [{weight_vd.shape[0]}, {weight_vd.shape[1]}] ({tied}) has an effective rank of "
            f"{ours.effective_rank:.1f} of {len(ours.values_m)} and its largest singular value is {ours.top_share:.1%} of "
            f"their sum; a random matrix of this shape has {random.effective_rank:.1f} and {random.top_share:.1%}."
        ),
        control="A matrix of independent normal numbers of the same shape, and the untrained model's own output matrix.",
        tables=_tables({"trained": ours, **controls}, f"The output matrix is {tied}."),
        figures=(_figure({"trained": ours, **controls}),),
        paper=PAPER,
    )


def _tables(columns: Mapping[str, Spectrum], note: str) -> tuple[Table, Table]:
    found = list(columns.values())
    numbers: tuple[tuple[str | float, ...], ...] = tuple(
        (label, *(one.metrics()[name] for one in found)) for name, label in LABELS.items()
    )
    rows = torch.stack([one.values_m.cpu() for one in found], dim=1).tolist()
    values = tuple((index + 1, *map(float, row)) for index, row in enumerate(rows))
    return (
        Table(title="head spectrum", columns=("number", *columns), rows=numbers, note=note),
        Table(title="singular values", columns=("index", *columns), rows=values),
    )


def _figure(columns: Mapping[str, Spectrum]) -> Figure:
    lines = tuple(
        Line(
            name=name,
            x=tuple(float(index + 1) for index in range(len(found.values_m))),
            y=tuple((found.values_m / found.values_m.sum()).clamp(min=1e-12).tolist()),
        )
        for name, found in columns.items()
    )
    return Figure(
        title="Singular values as shares of their sum",
        x_label="index",
        y_label="share",
        log_x=True,
        log_y=True,
        lines=lines,
    )
