"""Tables and figures of the layer-gradient analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchstone.diagnose.gradients.comparison import Comparison
from torchstone.diagnose.gradients.pairs import Example
from torchstone.diagnose.gradients.profile import Profile
from torchstone.diagnose.gradients.ratio import Ratio
from torchstone.report.result import Figure, Line, Table

Cell = str | float | int | None


@dataclass(frozen=True, eq=False)
class Condition:
    """What was measured of one condition.

    Attributes:
        name, examples: of the condition.
        own, irrelevant: with its own and with foreign responses; None where all responses are the same.
        untrained, untrained_irrelevant: the same in an untrained model.
        without_foreign: examples that have no irrelevant response.
    """

    name: str
    examples: tuple[Example, ...]
    own: Profile
    irrelevant: Profile | None
    untrained: Profile
    untrained_irrelevant: Profile | None
    without_foreign: int


def shown(value: float) -> float | None:
    """Four digits; None for what is not a number."""
    return float(f"{value:.4g}") if abs(value) < float("inf") else None


def conditions_table(found: Sequence[Condition]) -> Table:
    """Every condition with its controls: lengths, loss, nuclear norm and MAD by matrix."""
    matrices = found[0].own.matrices
    rows = []
    for c in found:
        variants: list[tuple[str, Profile | None]] = [
            ("own", c.own), ("irrelevant", c.irrelevant), ("own, untrained model", c.untrained),
            ("irrelevant, untrained model", c.untrained_irrelevant),
        ]  # fmt: skip
        rows += [_condition_row(c.name, label, profile) for label, profile in variants if profile is not None]
    return Table(
        title="Gradients by condition",
        columns=("condition", "response", "examples", "scored tokens", "loss", "effective rank", "nuclear norm",
                 *(f"nuclear {m}" for m in matrices), *(f"MAD {m}" for m in matrices)),
        rows=tuple(rows),
        note="Nuclear norms: mean over examples and layers. MAD: mean absolute difference of neighbouring layers.",
    )  # fmt: skip


def _condition_row(name: str, label: str, profile: Profile) -> tuple[Cell, ...]:
    means = profile.curve().nanmean(0).tolist()
    numbers = (
        float(profile.targets_n.double().mean()),
        float(profile.losses_n.nanmean()),
        float(profile.statistic("effective_rank").nanmean()),
        float(profile.overall().nanmean()),
        *means,
        *profile.mad().values(),
    )
    return (name, label, len(profile.ids), *(shown(value) for value in numbers))


def ratios_table(rows: Sequence[tuple[str, Ratio]]) -> Table:
    """Factors between conditions, raw and controlled."""
    return Table(
        title="Ratios of nuclear norms",
        columns=("comparison", "factor", "low", "high", "examples", "paired"),
        rows=tuple(
            (
                label,
                *(None if x is None else shown(x) for x in (r.value, r.low, r.high)),
                r.n,
                "yes" if r.paired else "no",
            )
            for label, r in rows
        ),
        note="Geometric means over examples; 95 % intervals over examples, none below 10.",
    )


def differences_table(comparison: Comparison, reference: str, other: str) -> Table:
    """Relative difference and the layers where it is largest, by matrix."""
    return Table(
        title=f"Relative difference: {other} against {reference}",
        columns=("matrix", "relative difference", "layers with the largest"),
        rows=tuple(
            (m, shown(comparison.rd[m]), ", ".join(map(str, comparison.top_layers[m]))) for m in comparison.matrices
        ),
        note=f"Mean over layers of |a − b|/|a|, a = {reference}.",
    )


def curves(found: Sequence[Condition]) -> tuple[Figure, ...]:
    """One figure per matrix: nuclear norm over layers of every condition, own and irrelevant."""
    figures = []
    for j, matrix in enumerate(found[0].own.matrices):
        lines = []
        for c in found:
            for label, profile in ((c.name, c.own), (f"{c.name}, irrelevant", c.irrelevant)):
                if profile is not None:
                    y = tuple(shown(value) for value in profile.curve()[:, j].tolist())
                    lines.append(Line(name=label, x=tuple(map(float, profile.layers)), y=y))
        title = f"Nuclear norm of gradients: {matrix}"
        figures.append(Figure(title=title, x_label="layer", y_label="nuclear norm", lines=tuple(lines)))
    return tuple(figures)
