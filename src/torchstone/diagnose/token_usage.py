"""Token usage: how much of each Pattention layer's output its parameter tokens carry, next to an untrained copy of the model.

    finding = token_usage_finding(open_subject("runs/mine"), load_texts([]))

A parameter token of a layer y = Σ_n w_n(x) v_n carries Σ |w_n(x)| · ‖v_n‖, summed over the tokens of the text
(`torchstone.models.growth.token_usage`). Its usage is that relative to an even share: 1 if all tokens of the layer were alike, 0
for one that does nothing, as tokens appended with zero keys do before training. The untrained copy is the control: GELU makes
usage uneven before anything is learned.

Shapes: b rows · t tokens of text · n parameter tokens.

Pitfall: contributions are added up by size. Tokens may cancel each other in the output, so a token that is used much need not
matter much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.data.batch import Batch
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.models.belief_state import BeliefState
from torchstone.models.growth import USES, pattention_layers, token_usage, usage_histogram
from torchstone.nn.projection.pattention import Pattention
from torchstone.nn.span import Span
from torchstone.report.finding import Finding, Heatmap
from torchstone.report.result import Figure, Line, Table

EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0)
BINS = ("< 0.01", *(f"{edge:g}" for edge in EDGES[1:-1]), f"≥ {EDGES[-1]:g}")
FEW = 0.1  # of an even share: little used
DEFAULT_LENGTH = 512
MOST_LINES = 6
SHORT = {"input": "in", "output": "out", "feedforward": "ffn"}


@dataclass(frozen=True, eq=False)
class LayerUsage:
    """Usage of one layer.

    Attributes:
        name: module path.
        use: input, output or feedforward.
        usage_n: fp32, usage of every token, mean 1.
        frozen: first tokens that are not trained.
    """

    name: str
    use: str
    usage_n: Tensor
    frozen: int

    @property
    def layer(self) -> str:
        """0 of `blocks.0.mixer.w_q`; "backward 0" in the backward encoder of a belief-state model."""
        encoder, _, rest = self.name.rpartition("blocks.")
        return " ".join([*filter(None, [encoder.removesuffix("_encoder.")]), rest.split(".")[0]])

    @property
    def map(self) -> str:
        """The end of the path, such as `w_q`."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def little(self) -> float:
        """Share of tokens with less than a tenth of an even share."""
        return float((self.usage_n < FEW).float().mean())

    @property
    def lower_half(self) -> float:
        """Share of the whole that the least used half of the tokens carries; 0.5 if all were alike."""
        ordered_n = self.usage_n.double().sort().values
        total = float(ordered_n.sum())
        return float(ordered_n[: len(ordered_n) // 2].sum()) / total if total else 0.0


class _Backwards(nn.Module):
    """A belief-state model of which the backward encoder reads."""

    def __init__(self, model: BeliefState) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_bt: Tensor, span: Span) -> Any:
        """See `BeliefState.suffixes`."""
        return self.model.suffixes(tokens_bt, span)


def token_usage_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    length: int | None = None,
    sequences: int = 8,
    seed: int = 0,
) -> Finding:
    """Usage of the parameter tokens of every layer, beside an untrained copy.

    Args:
        subject: a torchstone model with parameter tokens.
        texts: at least one of `length` tokens.
        length: tokens of a row; None: 512, or what the model saw at once in training if that is less.
        sequences: rows, which are read at once.
        seed: of the untrained weights.

    Raises:
        ConfigError: a model without parameter tokens. DataError: texts too short.
    """
    _require_tokens(subject)
    rows = length if length is not None else min(subject.trained_length or DEFAULT_LENGTH, DEFAULT_LENGTH)
    tokens_bt = token_rows(subject, texts, rows, sequences)
    found = usages(subject.model, tokens_bt)
    control = usages(subject.untrained(seed).model, tokens_bt)
    return Finding(
        analysis="token-usage",
        title="Usage of parameter tokens",
        question="Do all parameter tokens of a layer carry its output, or a few of them?",
        subject=subject.describe(),
        answer=_answer(found, control),
        control=(
            "The same architecture with untrained weights on the same tokens: random keys and GELU make usage uneven before "
            "anything is learned."
        ),
        tables=(_layer_table(found, control), _share_table(found, control)),
        heatmaps=tuple(
            _heatmap(f"Tokens by usage, {use}{who}", [one for one in layers if one.use == use])
            for use in _uses(found)
            for who, layers in (("", found), (", untrained", control))
        ),
        figures=tuple(_figure(found, control, use) for use in _uses(found)),
        notes=(
            f"{tokens_bt.shape[0]} rows of {tokens_bt.shape[1]} tokens of text.",
            "Usage is Σ |weight| · ‖value‖ relative to an even share, so 1 on average and 0 for a token that does nothing.",
        ),
    )


def usages(model: Any, tokens_bt: Tensor) -> list[LayerUsage]:
    """Usage of every layer with parameter tokens that runs, both encoders of a belief-state model included."""
    batch = Batch(tokens_bt, torch.zeros_like(tokens_bt))
    found = token_usage(model, batch)
    if isinstance(model, BeliefState):
        found |= {name.removeprefix("model."): one for name, one in token_usage(_Backwards(model), batch).items()}
    layers: dict[str, Pattention] = pattention_layers(model)
    return [LayerUsage(name, one.use, found[name], one.frozen) for name, one in layers.items() if name in found]


def _require_tokens(subject: Subject) -> None:
    try:
        pattention_layers(subject.model)
    except ConfigError as error:
        raise ConfigError(
            f"{subject.name} ({subject.architecture}) has no parameter tokens; give a torchstone model with "
            "`projection: pattention` or `feedforward: pattention`."
        ) from error


def _uses(found: list[LayerUsage]) -> list[str]:
    present = {one.use for one in found}
    return [use for use in USES if use in present]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _answer(found: list[LayerUsage], control: list[LayerUsage]) -> str:
    parts = []
    for use in _uses(found):
        own, other = ([one for one in layers if one.use == use] for layers in (found, control))
        half, fresh = (100 * _mean([one.lower_half for one in layers]) for layers in (own, other))
        little, before = (100 * _mean([one.little for one in layers]) for layers in (own, other))
        parts.append(
            f"{use.capitalize()}: the least used half of a layer's tokens carries {half:.3g} % of the output's magnitude "
            f"(untrained {fresh:.3g} %), and {little:.3g} % of the tokens have less than a tenth of an even share (untrained "
            f"{before:.3g} %)."
        )
    return " ".join(parts)


def _layer_table(found: list[LayerUsage], control: list[LayerUsage]) -> Table:
    rows = []
    for own, other in zip(found, control, strict=True):
        numbers = [
            _rounded(value)
            for get in (
                lambda one: one.lower_half,
                lambda one: one.little,
                _least,
                lambda one: float(one.usage_n.max()),
            )
            for value in (get(own), get(other))
        ]
        frozen = _rounded(float(own.usage_n[: own.frozen].mean())) if own.frozen else None
        rows.append((_number(own.layer), own.map, SHORT[own.use], len(own.usage_n), *numbers, own.frozen, frozen))
    names = ("half", "little", "least", "largest")
    return Table(
        title="Usage by layer",
        columns=(
            "layer", "map", "use", "tokens", *(f"{name}{who}" for name in names for who in ("", ", untrained")), "frozen",
            "mean of frozen",
        ),
        rows=tuple(rows),
        note="half: share of the output's magnitude that the least used half of the tokens carries (0.5: all alike); little: "
        "share of tokens below a tenth of an even share; least and largest usage of a token, relative to an even share.",
    )  # fmt: skip


def _least(one: LayerUsage) -> float:
    return float(one.usage_n.min())


def _share_table(found: list[LayerUsage], control: list[LayerUsage]) -> Table:
    rows = [
        (_number(one.layer), one.map, SHORT[one.use], who, *map(_rounded, usage_histogram(one.usage_n, EDGES).tolist()))
        for own, other in zip(found, control, strict=True)
        for who, one in (("model", own), ("untrained", other))
    ]
    return Table(
        title="Shares of tokens by usage",
        columns=("layer", "map", "use", "weights", *BINS),
        rows=tuple(rows),
        note="A column begins at its usage and ends before the next.",
    )


def _heatmap(title: str, layers: list[LayerUsage]) -> Heatmap:
    return Heatmap(
        title=title,
        x_label="usage (even share = 1)",
        y_label="layer and map",
        x=BINS,
        y=tuple(f"{one.layer} {one.map}" for one in layers),
        values=tuple(
            tuple(round(share, 4) for share in usage_histogram(one.usage_n, EDGES).tolist()) for one in layers
        ),
        unit="share",
    )


def _figure(found: list[LayerUsage], control: list[LayerUsage], use: str) -> Figure:
    """Usage of all tokens of some layers of a use, sorted, and of the first of them untrained."""
    own, fresh = ([one for one in layers if one.use == use] for layers in (found, control))
    chosen = sorted({round(i * (len(own) - 1) / (MOST_LINES - 1)) for i in range(MOST_LINES)})
    lines = [_line(f"{own[i].layer} {own[i].map}", own[i].usage_n) for i in chosen]
    lines.append(_line(f"untrained, {fresh[0].layer} {fresh[0].map}", fresh[0].usage_n))
    return Figure(
        title=f"Usage of {use} tokens",
        x_label="share of tokens",
        y_label="usage (even share = 1)",
        lines=tuple(lines),
        note="From the least to the most used token.",
    )


def _line(name: str, usage_n: Tensor) -> Line:
    ordered = usage_n.sort().values.tolist()
    return Line(name=name, x=tuple(i / len(ordered) for i in range(len(ordered))), y=tuple(map(_rounded, ordered)))


def _number(layer: str) -> int | str:
    return int(layer) if layer.isdigit() else layer


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
