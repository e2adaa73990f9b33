"""Rope usage: which rotary frequencies a model uses, and which of its heads look at a fixed offset.

Barbero et al. (arXiv 2410.06205) find that large rotary models use the fastest frequencies in a few heads only, which look
at the token itself or the one before (`offset heads`), and put most of the norm of queries and keys into the slowest, which
hardly turn. `rope_usage_finding` says how far that holds for one model.

    finding = rope_usage_finding(open_subject("path/to/model"), texts)

Two controls stand beside the numbers. The same model untrained shows what architecture and initialisation give by
themselves. Values, split into pairs as if they turned, show whether large channels have to do with rotation at all.

Terms: an *offset head* puts at least `threshold` of its weight on one offset (mean over queries, first tokens left out, see
`torchstone.diagnose.rotary.frequency_usage`). The positional heads of arXiv 2410.08703 are another set: there, `distance heads`.

Shapes: l layers · u query sub-heads · h heads · m frequency pairs.

Pitfall: norms say what a pair could contribute, not what it does; a sentence of the form "the model uses frequency g for x"
needs an intervention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchstone.diagnose.rotary import rope_usage_tables as tables
from torchstone.diagnose.rotary.frequency_usage import OFFSETS, LayerUsage, frequency_usage, rotary_layers
from torchstone.diagnose.rotary.offset_heads import THRESHOLD, OffsetHead, offset_heads
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.report.finding import Finding
from torchstone.report.result import PaperFigure

LENGTH = 64


def analyse_rope_usage(subject: Subject, tokens_bt: Tensor, seed: int = 0) -> tuple[tuple[LayerUsage, ...], ...]:
    """Usage of the subject, and of the same model untrained, on the same tokens.

    Args:
        tokens_bt: rows of equal length, from `token_rows`.
        seed: of the untrained model's weights.

    Raises:
        ConfigError: no layer is rotary.
        DataError: rows too short, or an activation that is not finite.
    """
    return frequency_usage(subject, tokens_bt), frequency_usage(subject.untrained(seed), tokens_bt)


@torch.no_grad()
def rope_usage_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    length: int | None = None,
    count: int = 10,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> Finding:
    """Frequency usage and offset heads of a model, beside its controls.

    Args:
        subject: a model with rotary position embedding.
        texts: documents; rows are cut from single texts.
        length: tokens of a row; None: 64, or what the model saw at once in training if that is less.
        count: rows.
        threshold: weight on one offset that makes an offset head, above 0 and at most 1.
        seed: of the untrained control.

    Raises:
        ConfigError: no layer is rotary, or the threshold is out of range.
        DataError: the texts are too short.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold is {threshold}; give the share of weight that makes an offset head, in (0, 1].")
    rotary = rotary_layers(subject)
    length = length if length is not None else min(LENGTH, subject.trained_length or LENGTH)
    tokens_bt = token_rows(subject, texts, length, count)
    usage, control = analyse_rope_usage(subject, tokens_bt, seed)
    heads, control_heads = offset_heads(usage, threshold), offset_heads(control, threshold)
    strongest = heads[0].layer if heads else tables.fastest_layer(usage)
    return Finding(
        analysis="rope-usage",
        title="Use of rotary frequencies",
        question="Which rotary frequencies do queries and keys use, and which heads look at a fixed offset?",
        subject=subject.describe(),
        answer=_answer(usage, control, heads, control_heads, threshold),
        control=(
            f"The same model with untrained weights (seed {seed}) on the same tokens: what the architecture gives by itself. "
            "And the values of the model, split into pairs as if they turned: no pattern belongs there."
        ),
        tables=(
            tables.offset_table(heads, usage, control, threshold),
            tables.summary_table(usage, control, len(heads), len(control_heads)),
            tables.frequency_table(usage, control),
            tables.usage_table(usage, control),
            tables.mass_table(usage, control),
            tables.ranking_table(usage),
        ),
        heatmaps=tables.heatmaps(usage, control, strongest, [head.head for head in heads if head.layer == strongest]),
        figures=(tables.share_figure(usage, control),),
        paper=_paper(usage, heads),
        notes=_notes(subject, rotary, tokens_bt),
    )


def _answer(
    usage: Sequence[LayerUsage],
    control: Sequence[LayerUsage],
    heads: Sequence[OffsetHead],
    control_heads: Sequence[OffsetHead],
    threshold: float,
) -> str:
    slow, plain = tables.mean_share(usage, "slow_share_u"), tables.mean_share(control, "slow_share_u")
    q, k, v = tables.mean_energy(usage)
    total = sum(layer.mass_oh.shape[1] for layer in usage)
    offsets = ", ".join(
        f"{sum(head.offset == o for head in heads)} at {o}" for o in sorted({h.offset for h in heads})[::-1]
    )
    return (
        f"The slowest quarter of the frequencies has {slow:.0%} of the q·k usage (untrained {plain:.0%}), and {q:.0%}, {k:.0%} "
        f"and {v:.0%} of the squared norm of queries, keys and values. {len(heads)} of {total} heads are offset heads (at least "
        f"{threshold:.0%} of their weight on one offset{': ' if offsets else ''}{offsets}); untrained: {len(control_heads)}."
    )


def _paper(usage: Sequence[LayerUsage], heads: Sequence[OffsetHead]) -> tuple[PaperFigure, ...]:
    """What the paper prints of Gemma 7B, beside ours."""
    aligned = [
        float(layer.aligned_u[head.head])
        for head in heads
        for layer in usage
        if head.layer == layer.layer and head.offset == 0 and layer.aligned_u.shape[0] == layer.mass_oh.shape[1]
    ]
    return (
        PaperFigure(
            setting="slowest quarter's share of q·k usage",
            paper="most of the norm (Gemma 7B, figures only)",
            ours=f"{tables.mean_share(usage, 'slow_share_u'):.1%}",
        ),
        PaperFigure(
            setting="alignment of a diagonal head (offset 0), mean over tokens",
            paper="0.75 (Gemma 7B, layer 1, head 5: logits 120/182, 157/204, …)",
            ours=", ".join(f"{value:.2f}" for value in aligned[:5]) or "no such head",
        ),
        PaperFigure(
            setting="offset heads",
            paper="a few, at offsets 0 and -1 (Gemma 7B, first and last layers)",
            ours=", ".join(f"layer {head.layer} head {head.head}: {head.offset}" for head in heads[:5]) or "none",
        ),
    )


def _notes(subject: Subject, rotary: Sequence[int], tokens_bt: Tensor) -> tuple[str, ...]:
    rows, length = tokens_bt.shape
    notes = [
        f"{rows} rows of {length} tokens. Masses are over queries with at least {OFFSETS} tokens before them, so that no "
        "offset means the first token."
    ]
    if subject.trained_length is not None and length > subject.trained_length:
        notes.append(f"Rows are longer than the {subject.trained_length} tokens that the model was trained on.")
    kinds = sorted({layer.rotation.description for layer in subject.layers if layer.rotation is not None})
    notes.append(f"Rotation: {'; '.join(kinds)}.")
    still = sorted({int((layer.rotation.frequencies_m == 0).sum()) for layer in subject.layers if layer.rotation})
    if still != [0]:
        notes.append(
            f"{' or '.join(map(str, still))} pairs of a head do not turn (p-RoPE or partial rotation); they count as slowest."
        )
    if len(rotary) < len(subject.layers):
        notes.append(
            f"{len(subject.layers) - len(rotary)} of {len(subject.layers)} attention layers do not turn; left out."
        )
    return tuple(notes)
