"""Anisotropy: the mean cosine between the hidden states of different tokens, layer by layer.

    mean over i ≠ j of cos(h_i, h_j) = (‖Σ_i ĥ_i‖² − n) / (n (n − 1)),   ĥ = h / ‖h‖

so that n states of d channels cost n·d, not n²·d, and no n × n matrix is made. It lies between −1/(n − 1) and 1; independent
directions give 0. Godey et al. (arXiv 2404.07647) see it jump in the last layers of small models where their loss saturates.

Raw and centred values stand side by side, because a common mean vector alone makes states anisotropic, and softmax cannot use
a direction that all tokens share: many models that look anisotropic are isotropic around their mean.

Shapes: n tokens · t tokens of a row · d channels.

Pitfalls: tokens should come from different documents, since neighbours are alike. States of the first token of a row are often
outliers in large models; they count like any other here, except that special tokens before the text (BOS), which are the same in
every row, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.diagnose.adapters.losses import state_names
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import DataError
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, PaperFigure, Table

ROWS_AT_ONCE = 8
PAPER = (
    PaperFigure(
        setting="last-layer anisotropy during training (Pythia)",
        paper="jumps where the loss of models below 410M saturates; not in models of 1B and more",
        note="a trajectory: `saturation` shows it for a series of checkpoints",
    ),
)


@dataclass(frozen=True)
class LayerAnisotropy:
    """One layer's numbers: the mean cosine of the states, and of the states minus their mean."""

    layer: str
    raw: float
    centred: float


def anisotropy(states_nd: Tensor, name: str = "these states") -> float:
    """Mean cosine between different rows, in fp64.

    Args:
        states_nd: at least two vectors, none of them zero.
        name: what the rows are, for messages.

    Raises:
        DataError: fewer than two rows, or a row that is zero or not finite.
    """
    if states_nd.dim() != 2 or states_nd.shape[0] < 2:
        raise DataError(
            f"anisotropy compares different tokens, so it needs at least 2 rows of channels; {name} have the shape "
            f"{list(states_nd.shape)}. Give more text."
        )
    return _mean_cosine(_unit(states_nd, name, 0).sum(0), states_nd.shape[0])


def layer_anisotropy(subject: Subject, tokens_nt: Tensor, skip: int = 0) -> list[LayerAnisotropy]:
    """Both numbers after the embedding, after every block and after the final norm.

    The model runs twice, so that no more than a few rows of states are ever held.

    Args:
        subject: the model.
        tokens_nt: int64 rows of equal length, best each from another document.
        skip: tokens at the start of every row that are context and do not count, such as `subject.first_tokens()`.

    Raises:
        DataError: fewer than two tokens, or a state that is zero or not finite; names layer and token.
    """
    count = tokens_nt[:, skip:].numel()
    if count < 2:
        raise DataError(f"anisotropy compares different tokens, so it needs at least 2; {count} were given.")
    means, raw = _sums(subject, tokens_nt, skip, None)
    _, centred = _sums(subject, tokens_nt, skip, [mean_d / count for mean_d in means])
    names = state_names(len(raw))
    return [
        LayerAnisotropy(name, _mean_cosine(a_d, count), _mean_cosine(b_d, count))
        for name, a_d, b_d in zip(names, raw, centred, strict=True)
    ]


def _sums(
    subject: Subject, tokens_nt: Tensor, skip: int, centres: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer, fp64 [d]: the sum of the states, and the sum of their directions (from the centres, if given)."""
    states: list[Tensor] = []
    directions: list[Tensor] = []
    for start in range(0, tokens_nt.shape[0], ROWS_AT_ONCE):
        layers = subject.hidden_states(tokens_nt[start : start + ROWS_AT_ONCE])
        for index, (name, layer_btd) in enumerate(zip(state_names(len(layers)), layers, strict=True)):
            rows_nd = layer_btd[:, skip:].flatten(0, 1).double()
            if centres is not None:
                rows_nd = rows_nd - centres[index]
                name = f"{name} minus its mean"
            unit_d = _unit(rows_nd, f"the states of {name}", start * (tokens_nt.shape[1] - skip)).sum(0)
            if len(states) == index:
                states.append(torch.zeros_like(unit_d))
                directions.append(torch.zeros_like(unit_d))
            states[index] += rows_nd.sum(0)
            directions[index] += unit_d
    return states, directions


def _unit(states_nd: Tensor, name: str, first: int) -> Tensor:
    """Rows of length 1 in fp64; raises DataError for rows without a direction."""
    rows_nd = states_nd.double()
    largest_n1 = rows_nd.abs().amax(1, keepdim=True)
    bad = ~(largest_n1.isfinite() & (largest_n1 > 0)).squeeze(1)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        what = "zero" if bool(rows_nd[at].isfinite().all()) else "not finite"
        raise DataError(
            f"{name}: token {first + at} has a vector that is {what}, which has no direction. Look for padding, identical "
            "tokens or overflow (analyse the model in fp32)."
        )
    scaled_nd = rows_nd / largest_n1  # so that squares of very large or small numbers exist
    return scaled_nd / torch.linalg.vector_norm(scaled_nd, dim=1, keepdim=True)


def _mean_cosine(direction_d: Tensor, count: int) -> float:
    return (float(direction_d.square().sum()) - count) / (count * (count - 1))


def anisotropy_finding(
    subject: Subject, texts: Sequence[str], *, tokens: int = 8192, length: int = 64, seed: int = 0
) -> Finding:
    """Anisotropy of every layer next to the same model untrained.

    Args:
        subject: the model.
        texts: documents; each row comes from one of them.
        tokens: how many tokens to compare (5 to 20 thousand are enough for two digits).
        length: tokens of a row.
        seed: of the untrained control's weights.

    Raises:
        DataError: not enough text, or states without a direction.
    """
    rows_nt = token_rows(subject, texts, length, max(1, tokens // length))
    skip = len(subject.first_tokens())
    ours = layer_anisotropy(subject, rows_nt, skip)
    control = layer_anisotropy(subject.untrained(seed), rows_nt, skip)
    x = tuple(float(index) for index in range(len(ours)))
    lines = (
        Line(name="raw", x=x, y=tuple(layer.raw for layer in ours)),
        Line(name="centred", x=x, y=tuple(layer.centred for layer in ours)),
        Line(name="raw, untrained", x=x, y=tuple(layer.raw for layer in control)),
    )
    last, fresh = ours[-1], control[-1]
    return Finding(
        analysis="anisotropy",
        title="Anisotropy of hidden states",
        question="Do the hidden states of different tokens point the same way?",
        subject=subject.describe(),
        answer=(
            f"The mean cosine between last-layer states is {last.raw:.3f}, and {last.centred:.3f} around their mean; "
            f"with untrained weights it is {fresh.raw:.3f} and {fresh.centred:.3f}. Independent directions give 0."
        ),
        control="The same architecture with fresh random weights on the same tokens: what the architecture alone does.",
        tables=(
            Table(
                title="anisotropy by layer",
                columns=("layer", "raw", "centred", "raw untrained", "centred untrained"),
                rows=tuple((a.layer, a.raw, a.centred, b.raw, b.centred) for a, b in zip(ours, control, strict=True)),
                note="Mean cosine between the states of different tokens; centred: after subtracting the layer's mean.",
            ),
        ),
        figures=(
            Figure(title="Anisotropy by layer", x_label="layer (0: embedding)", y_label="mean cosine", lines=lines),
        ),
        paper=PAPER,
        notes=(f"{rows_nt[:, skip:].numel()} tokens of text in rows of {rows_nt.shape[1]}.",),
    )
