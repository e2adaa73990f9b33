"""Memory: how long the recurrent layers of a model remember, next to an untrained copy of itself.

    finding = memory_finding(open_subject("runs/mine"), load_texts([]))

A number of a state that is multiplied by f at every token fades to 1/e in about 1 / (1 − f) tokens: the effective memory of the
gate. Here of every token and channel of each `hgrn2` layer (f is the forget gate) and each `rglru` layer (f is the factor a)

    memory = 1 / (1 − f),   f = β + (1 − β) σ(z)  or  f = a = exp(−8 r softplus(α)),  r = σ(BD_r(z))

measured on text; the learned lower bounds β; the decay of every channel; and the bytes of the decoding state against the length
of the context. The untrained copy is the control: initial decays and bounds already spread over channels and layers.

Shapes: b rows · t tokens · d channels of the mixer · n = b·t·d gates.

Pitfalls
- 1 − f is computed as it is in the layer, and not as a difference, which rounds to 0 where a gate is almost open.
- The memory of a gate is that of a state which would see this gate for ever. Where gates vary, one that is almost closed forgets
  what the others would keep: the mean over tokens of 1 − f, from which the spectrum of hgrn2 is taken, says more of a channel.
- The start of a document empties the state whatever the gate says; gates are counted as they are computed from the token.
- Layers of attention have no decay. What they see is bounded by their window alone, and they show in the bytes of the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.models.belief_state import BeliefState
from torchstone.models.stack import Stack
from torchstone.nn.recurrence.hgrn2 import HGRN2, MEMORY_EDGES
from torchstone.nn.recurrence.rglru import RGLRU, SHARPNESS, RecurrentBlock
from torchstone.report import numbers
from torchstone.report.finding import Finding, Heatmap
from torchstone.report.result import Figure, Line, Table

CONTEXTS = (256, 1024, 4096, 16_384, 65_536)
DEFAULT_LENGTH = 512
QUANTILES = (0.1, 0.5, 0.9)
MOST_LINES = 6
LEAST = 1e-12  # of 1 − f
BINS = ("< 2", *(f"{edge:g}" for edge in MEMORY_EDGES[:-1]), f"≥ {MEMORY_EDGES[-1]:g}")


@dataclass(frozen=True, eq=False)
class GateMemory:
    """How long one layer remembers, in tokens.

    Attributes:
        layer: index of the block, or "backward 3" in the backward encoder of a belief-state model.
        kind: hgrn2 or rglru.
        shares: of all gates, by memory: below 2, 2 to 4, … and 4096 or more; they sum to 1.
        quantiles: of the memory, at `QUANTILES`.
        whole: share of gates whose memory is a row of the text or more.
        spectrum_d: fp64, memory of every channel, ascending: for hgrn2 that of the mean over tokens of 1 − f, for rglru that of
            the decay at half open recurrence gates.
        bound_d: fp64, lower bound β of every channel; None where there is none.
    """

    layer: int | str
    kind: str
    shares: tuple[float, ...]
    quantiles: tuple[float, ...]
    whole: float
    spectrum_d: Tensor
    bound_d: Tensor | None


def memory_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    length: int | None = None,
    sequences: int = 8,
    contexts: tuple[int, ...] = CONTEXTS,
    seed: int = 0,
) -> Finding:
    """Effective memory, lower bounds and decays of every recurrent layer, and bytes of the state.

    Args:
        subject: a torchstone model with hgrn2 or rglru layers.
        texts: at least one of `length` tokens.
        length: tokens of a row; None: 512, or what the model saw at once in training if that is less.
        sequences: rows, which are read at once.
        contexts: lengths in tokens at which the bytes of the decoding state are counted.
        seed: of the untrained weights.

    Raises:
        ConfigError: a model without such layers, or a context below 1. DataError: texts too short.
    """
    require_recurrence(subject)
    if not contexts or min(contexts) < 1:
        raise ConfigError(f"contexts were given as {list(contexts)}; give lengths of 1 or more tokens, such as 1024.")
    places = tuple(sorted(set(contexts)))
    rows = length if length is not None else min(subject.trained_length or DEFAULT_LENGTH, DEFAULT_LENGTH)
    tokens_bt = token_rows(subject, texts, rows, sequences)
    found = gate_memories(subject.model, tokens_bt)
    control = gate_memories(subject.untrained(seed).model, tokens_bt)
    bytes_cl = state_bytes(subject.model, places)
    return Finding(
        analysis="memory",
        title="Memory of recurrent layers",
        question="How many tokens do the recurrent layers remember, and what does their state cost as the context grows?",
        subject=subject.describe(),
        answer=_answer(found, control, rows, bytes_cl, places),
        control=(
            "The same architecture with untrained weights on the same tokens: initial decays and lower bounds spread over "
            "channels and layers before anything is learned. For bytes: keys and values of attention as wide as the model, in "
            "every layer and without a window."
        ),
        tables=(
            _layer_table(found, control, rows),
            _share_table(found, control),
            *_bound_tables(found, control),
            _state_table(bytes_cl, places),
        ),
        heatmaps=(
            _heatmap("Share of gates by memory", found),
            _heatmap("Share of gates by memory, untrained", control),
        ),
        figures=(
            *(figure for kind in ("hgrn2", "rglru") for figure in _spectra(found, control, kind)),
            _state_figure(bytes_cl, places),
        ),
        notes=_notes(subject, tokens_bt),
    )


def require_recurrence(subject: Subject) -> None:
    """Raise ConfigError unless the subject is a torchstone model with layers whose gates can be read."""
    if not isinstance(subject.model, Stack):
        raise ConfigError(
            f"{subject.name} is a {subject.architecture}, whose gates this analysis cannot read; give a torchstone run with "
            "`mixer: hgrn2` or `mixer: rglru` (`torchstone import` makes one of a RecurrentGemma checkpoint)."
        )
    if not _units(subject.model):
        raise ConfigError(
            f"{subject.name} has no hgrn2 or rglru layer, whose gates this analysis reads; give a model with "
            "`mixer: hgrn2`, `mixer: rglru` or a pattern that holds one."
        )


def _units(model: nn.Module) -> dict[str, HGRN2 | RGLRU]:
    """Recurrent units by the path of their mixer, in the model's order."""
    return {
        path.removesuffix(".rg_lru"): module
        for path, module in model.named_modules()
        if isinstance(module, HGRN2 | RGLRU)
    }


@torch.no_grad()
def gate_memories(model: Any, tokens_bt: Tensor) -> list[GateMemory]:
    """The memory of every recurrent layer while a model reads these tokens, in the model's order.

    Args:
        model: a decoder, or a belief-state model, whose backward encoder reads the tokens from the last to the first.
        tokens_bt: int64.
    """
    units, found = _units(model), dict[str, GateMemory]()

    def watch(path: str, unit: HGRN2 | RGLRU) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            closing_btd = _closing(unit, inputs[0])
            found[path] = _memory(_layer(path), unit, closing_btd.double(), tokens_bt.shape[1])

        return unit.register_forward_pre_hook(look)

    with ExitStack() as stack:
        for path, unit in units.items():
            stack.callback(watch(path, unit).remove)
        model(tokens_bt)
        if isinstance(model, BeliefState):
            model.suffixes(tokens_bt)
    return [found[path] for path in units if path in found]


def _closing(unit: HGRN2 | RGLRU, inputs_btd: Tensor) -> Tensor:
    """1 − f of every token and channel, in fp32 or finer."""
    if isinstance(unit, HGRN2):
        return unit.gates(inputs_btd)[2]
    fine = torch.promote_types(inputs_btd.dtype, torch.float32)
    r_btd = unit.recurrence_gate(inputs_btd).to(fine).sigmoid()
    return -torch.expm1(-SHARPNESS * r_btd * F.softplus(unit.alpha.to(fine)))


def _layer(path: str) -> int | str:
    """The layer of a mixer: 3 for `blocks.3.mixer`, "backward 3" for `backward_encoder.blocks.3.mixer`."""
    *encoder, _, layer, _ = path.split(".")
    return f"{encoder[0].removesuffix('_encoder')} {layer}" if encoder else int(layer)


def _memory(layer: int | str, unit: HGRN2 | RGLRU, closing_btd: Tensor, row: int) -> GateMemory:
    memory_n = (1 / closing_btd.flatten().clamp_min(LEAST)).sort().values
    edges_e = torch.tensor(MEMORY_EDGES, dtype=memory_n.dtype, device=memory_n.device)
    counts_e = torch.bucketize(memory_n, edges_e, right=True).bincount(minlength=len(BINS))
    bound_d = None
    if isinstance(unit, HGRN2):
        channel_d = closing_btd.mean((0, 1))
        bound = unit.bound(torch.device("cpu"), torch.float64)
        bound_d = None if bound is None else bound[0].detach().expand(unit.width)
    else:
        channel_d = -torch.expm1(-0.5 * SHARPNESS * F.softplus(unit.alpha.double()))
    return GateMemory(
        layer=layer,
        kind="hgrn2" if isinstance(unit, HGRN2) else "rglru",
        shares=tuple((counts_e / len(memory_n)).tolist()),
        quantiles=tuple(float(memory_n[int(share * (len(memory_n) - 1))]) for share in QUANTILES),
        whole=float((memory_n >= row).double().mean()),
        spectrum_d=(1 / channel_d.clamp_min(LEAST)).sort().values.cpu(),
        bound_d=bound_d,
    )


def state_bytes(model: Any, contexts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Bytes of the decoding state of one sequence with room for each context: of all layers, of the recurrent ones, and of
    keys and values of full attention as wide as the model in every layer, in the type of the weights. Nothing is allocated."""
    weight, blocks = model.embed.weight, list(model.blocks)
    found = []
    for context in contexts:
        state = model.new_state(1, context, device="meta")
        recurrent = sum(
            layer.nbytes()
            for layer, block in zip(state.layers, blocks, strict=True)
            if isinstance(block.mixer, HGRN2 | RecurrentBlock)
        )
        attention = 2 * len(blocks) * context * weight.shape[1] * weight.element_size()
        found.append((state.nbytes(), recurrent, attention))
    return found


def _answer(
    found: list[GateMemory],
    control: list[GateMemory],
    row: int,
    bytes_cl: list[tuple[int, int, int]],
    contexts: Sequence[int],
) -> str:
    def whole(layers: list[GateMemory]) -> float:
        return 100 * sum(one.whole for one in layers) / len(layers)

    def range_of(layers: list[GateMemory]) -> str:
        medians = [one.quantiles[1] for one in layers]
        return f"{min(medians):.3g} to {max(medians):.3g}"

    first, last = bytes_cl[0][0], bytes_cl[-1][0]
    size = f"The state of a sequence takes {numbers.size(first)} at {contexts[0]:,} tokens of context"
    if len(contexts) > 1:
        times = "the same" if first == last else numbers.size(last)
        size += f" and {times} at {contexts[-1]:,}"
    return (
        f"Median effective memory by layer: {range_of(found)} tokens (untrained {range_of(control)}). "
        f"{whole(found):.3g} % of all gates remember a row of {row} tokens or more (untrained {whole(control):.3g} %). "
        f"{size} (attention as wide as the model: {numbers.size(bytes_cl[-1][2])})."
    )


def _layer_table(found: list[GateMemory], control: list[GateMemory], row: int) -> Table:
    rows = []
    for own, other in zip(found, control, strict=True):
        values = [
            value
            for low, high in zip(own.quantiles, other.quantiles, strict=True)
            for value in (_rounded(low), _rounded(high))
        ]
        low, low_fresh, median, median_fresh, high, high_fresh = values
        wholes = (round(own.whole, 6), round(other.whole, 6))
        rows.append((own.layer, own.kind, median, median_fresh, low, high, low_fresh, high_fresh, *wholes))
    return Table(
        title="Memory by layer",
        columns=(
            "layer", "mixer", "median", "median, untrained", "10 %", "90 %", "10 %, untrained", "90 %, untrained",
            "whole row", "whole row, untrained",
        ),
        rows=tuple(rows),
        note=f"Effective memory 1 / (1 − f) in tokens: quantiles over tokens and channels. Whole row: share of gates with {row} "
        "tokens or more.",
    )  # fmt: skip


def _share_table(found: list[GateMemory], control: list[GateMemory]) -> Table:
    rows = [
        (one.layer, who, *(round(share, 6) for share in one.shares))
        for own, other in zip(found, control, strict=True)
        for who, one in (("model", own), ("untrained", other))
    ]
    return Table(
        title="Shares of gates by memory",
        columns=("layer", "weights", *BINS),
        rows=tuple(rows),
        note="Of all tokens and channels. A column begins at its number of tokens and ends before the next.",
    )


def _bound_tables(found: list[GateMemory], control: list[GateMemory]) -> Iterator[Table]:
    """Lower bounds by layer; no table where no layer has one."""
    rows = []
    for own, other in zip(found, control, strict=True):
        if own.bound_d is not None and other.bound_d is not None:
            mean, least, most = (float(value) for value in (own.bound_d.mean(), own.bound_d.min(), own.bound_d.max()))
            fresh = float(other.bound_d.mean())
            rows.append((own.layer, *map(_rounded, (mean, fresh, least, most, 1 / max(1 - mean, LEAST)))))
    if rows:
        yield Table(
            title="Lower bounds",
            columns=("layer", "mean β", "mean β, untrained", "least β", "largest β", "memory at mean β"),
            rows=tuple(rows),
            note="β over channels; no gate of the layer remembers less than 1 / (1 − β) tokens. Layers without a bound are left "
            "out.",
        )


def _state_table(bytes_cl: list[tuple[int, int, int]], contexts: Sequence[int]) -> Table:
    return Table(
        title="State by context",
        columns=("context", "state", "recurrent layers", "full attention", "state (bytes)"),
        rows=tuple(
            (context, *map(numbers.size, sizes), sizes[0]) for context, sizes in zip(contexts, bytes_cl, strict=True)
        ),
        note="Of one sequence, in decoding. Full attention: keys and values of all heads in every layer, as wide as the model.",
    )


def _heatmap(title: str, layers: list[GateMemory]) -> Heatmap:
    return Heatmap(
        title=title,
        x_label="effective memory (tokens)",
        y_label="layer",
        x=BINS,
        y=tuple(str(one.layer) for one in layers),
        values=tuple(tuple(round(share, 4) for share in one.shares) for one in layers),
        unit="share",
    )


def _spectra(found: list[GateMemory], control: list[GateMemory], kind: str) -> Iterator[Figure]:
    """Memory of the channels of some layers of a kind, and of the first of them untrained; none without such layers."""
    own = [one for one in found if one.kind == kind]
    if not own:
        return
    chosen = sorted({round(i * (len(own) - 1) / (MOST_LINES - 1)) for i in range(MOST_LINES)})
    lines = [_spectrum(f"layer {own[i].layer}", own[i]) for i in chosen]
    fresh = [one for one in control if one.kind == kind]
    lines += [_spectrum(f"untrained, layer {fresh[i].layer}", fresh[i]) for i in sorted({chosen[0], chosen[-1]})]
    how = {
        "hgrn2": "1 / (mean of 1 − f over tokens) of every channel.",
        "rglru": "1 / (1 − a) of every channel while its recurrence gate is half open; from the weights alone.",
    }
    yield Figure(
        title=f"Decay spectrum of {kind}",
        x_label="share of channels",
        y_label="memory (tokens)",
        log_y=True,
        lines=tuple(lines),
        note=how[kind],
    )


def _spectrum(name: str, one: GateMemory) -> Line:
    count = len(one.spectrum_d)
    return Line(
        name=name, x=tuple(i / count for i in range(count)), y=tuple(_rounded(v) for v in one.spectrum_d.tolist())
    )


def _state_figure(bytes_cl: list[tuple[int, int, int]], contexts: Sequence[int]) -> Figure:
    names = ("this model", "its recurrent layers", "full attention of this width")
    lines = [
        Line(name=name, x=tuple(map(float, contexts)), y=tuple(sizes[index] / 1024 for sizes in bytes_cl))
        for index, name in enumerate(names)
    ]
    same = all(total == recurrent for total, recurrent, _ in bytes_cl)
    return Figure(
        title="State size",
        x_label="context (tokens)",
        y_label="state of a sequence (KiB)",
        log_x=True,
        log_y=True,
        lines=tuple(line for index, line in enumerate(lines) if index != 1 or not same),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _notes(subject: Subject, tokens_bt: Tensor) -> tuple[str, ...]:
    notes = [
        f"{tokens_bt.shape[0]} rows of {tokens_bt.shape[1]} tokens.",
        "A gate's memory is that of a state which would see this gate for ever.",
    ]
    if isinstance(subject.model, BeliefState):
        notes.append(
            "Layers of the backward encoder read the rows from their end; the decoding state is the forward one."
        )
    return tuple(notes)
