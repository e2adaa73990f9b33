"""Distance heads: heads whose slow rotary pairs take over as the distance of two tokens grows.

Hong et al., "On the token distance modeling ability of higher RoPE attention dimension", arXiv 2410.08703, call them
positional heads. Barbero et al. (arXiv 2410.06205) give that name to another set, heads that look at a fixed offset with
fast pairs; here those are `offset heads` and the former `distance heads`.

    table = distance_heads(subject, tokens_bt)
    table.selected(0.1)                               # [(layer, head), …], the strongest first

Scores are in `scores`, with a permutation null for each head; the second control is
`distance_heads(subject.untrained(), tokens_bt)`. A correlation of scores is no proof of a function: `ablation` is.

Shapes: b sequences · t tokens or distances · h query heads · m frequency pairs · z buckets of distance.

Pitfalls: attention sinks hold much of the weight and are no distance: the first `skip_sink` keys are left out. Distances
in rows packed from several documents mean nothing: give rows of one text each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchstone.diagnose.distance import scores
from torchstone.diagnose.distance.attended_pairs import RANDOM_PER_TOKEN, PairChoice, add_attended, add_random
from torchstone.diagnose.distance.sums import DistanceSums, SumsBuilder
from torchstone.diagnose.rotary.pairs import random_pairs
from torchstone.diagnose.rotary.recomputed import LayerInputs
from torchstone.diagnose.subject import Activations, AttentionLayer, Head, Subject
from torchstone.errors import ConfigError, DataError

OFFSETS = (0, 1)  # itself, the token before
OFFSET_MASS = 0.9
MIN_NULL = 2
Maps = Literal["recompute", "model"]


@dataclass(frozen=True)
class DistanceSettings:
    """How heads are scored.

    Attributes:
        pairs: `attended` weighs every earlier key by its attention; `random` draws 100 · length pairs of equal weight.
        skip_sink: first keys of a sequence that do not count.
        keys: most attended keys of a query that count; None: all. With fewer earlier keys than that, all count.
        queries: queries of a row that are read, evenly spread; None: all. Shorter rows are read whole.
        null: random reassignments of distances.
        score: what heads are ranked by: a name in `scores.SCORES`, or a function of the sums of a layer.
        far: pairs at least far · length apart are far.
        buckets: rising lower edges of the buckets of distance, from 1; None: powers of two up to a quarter of the length.
        maps: `recompute` attention from queries and keys, or read the `model`'s own (h·t·t numbers at once).
        seed: of the random pairs and the null.
    """

    pairs: PairChoice = "attended"
    skip_sink: int = 4
    keys: int | None = 64
    queries: int | None = 768
    null: int = 200
    score: str | scores.Score = "shift"
    far: float = 0.5
    buckets: tuple[int, ...] | None = None
    maps: Maps = "recompute"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pairs not in ("attended", "random"):
            raise ConfigError(f"pairs is {self.pairs!r}; allowed: attended, random.")
        if self.maps not in ("recompute", "model"):
            raise ConfigError(f"maps is {self.maps!r}; allowed: recompute, model.")
        if self.null < MIN_NULL or self.skip_sink < 0 or not 0 < self.far < 1:
            raise ConfigError(
                f"null is {self.null}, skip_sink {self.skip_sink} and far {self.far:g}; null must be at least {MIN_NULL}, "
                "skip_sink at least 0, and far between 0 and 1."
            )
        for name, value in (("keys", self.keys), ("queries", self.queries)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1, or None for all.")
        scores.score_named(self.score)

    def edges(self, length: int) -> tuple[int, ...]:
        """Buckets for rows of `length` tokens.

        Raises:
            ConfigError: edges that do not rise from 1.
            DataError: rows too short for the buckets.
        """
        if self.buckets is None:
            edges = [1]
            while edges[-1] * 8 <= length:
                edges.append(edges[-1] * 2)
        else:
            edges = list(self.buckets)
        if not edges or edges[0] != 1 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
            raise ConfigError(f"buckets are {edges}; give rising distances, the first of them 1.")
        needed = max(4 * edges[-1], self.skip_sink + 4)
        if length < needed:
            raise DataError(
                f"rows have {length} tokens, but with a largest distance bucket of {edges[-1]} and {self.skip_sink} sink tokens "
                f"at least {needed} are needed, so that every distance is seen often enough; give longer texts, a larger "
                "max_length, or smaller buckets."
            )
        return tuple(edges)


@dataclass(frozen=True, eq=False)
class LayerScores:
    """One layer's numbers, fp64 on the CPU.

    Attributes:
        layer: index among the subject's attention layers.
        score_h, z_h: the ranking score, and its distance from the null in null standard deviations.
        shift_h, far_h: see `scores`.
        mean_distance_h: mean distance of attention to earlier tokens; share_beyond_h: its share beyond a quarter of
            the length.
        offset_mass_oh: mean attention to the token itself and to the one before.
        usage_hm, far_profile_hm: see `scores`.
        centre_hz, parts_hzm: mean centre of dimension and mean parts in every bucket of distance.
    """

    layer: int
    score_h: Tensor
    z_h: Tensor
    shift_h: Tensor
    far_h: Tensor
    mean_distance_h: Tensor
    share_beyond_h: Tensor
    offset_mass_oh: Tensor
    usage_hm: Tensor
    far_profile_hm: Tensor
    centre_hz: Tensor
    parts_hzm: Tensor

    def offset(self, head: int) -> int | None:
        """The fixed offset (0: itself, 1: the token before) that holds at least 90 % of a head's attention, if any."""
        mass, offset = self.offset_mass_oh[:, head].max(0)
        return OFFSETS[int(offset)] if float(mass) >= OFFSET_MASS else None

    def eligible(self) -> Tensor:
        """bool [h]: score above 0 and mean distance above the layer's median; heads without a mean distance are left out."""
        return (self.score_h > 0) & (self.mean_distance_h > self.mean_distance_h.nanmedian())


@dataclass(frozen=True)
class HeadTable:
    """Scores of all heads of a subject's rotary layers.

    Attributes:
        layers: one entry per scored layer.
        edges: lower edges of the buckets of distance.
        length, sequences: of the rows that were read.
        skipped: indices of layers without rotary positions.
        settings: how the heads were scored.
    """

    layers: tuple[LayerScores, ...]
    edges: tuple[int, ...]
    length: int
    sequences: int
    skipped: tuple[int, ...]
    settings: DistanceSettings

    def heads(self) -> list[Head]:
        """All scored heads, in order."""
        return [(scored.layer, head) for scored in self.layers for head in range(len(scored.score_h))]

    def of(self, layer: int) -> LayerScores:
        """The scores of a layer; raises ConfigError where it was not scored."""
        for scored in self.layers:
            if scored.layer == layer:
                return scored
        known = ", ".join(str(scored.layer) for scored in self.layers)
        raise ConfigError(f"layer {layer} has no distance scores; scored layers: {known}.")

    def column(self, name: str) -> Tensor:
        """One number per head in the order of `heads`: `score`, `z`, `shift`, `far`, `mean_distance`, `share_beyond`."""
        return torch.cat([getattr(scored, f"{name}_h") for scored in self.layers])

    def ranked(self) -> list[Head]:
        """Eligible heads (score above 0, mean distance above the layer's median), the highest score first."""
        eligible = torch.cat([scored.eligible() for scored in self.layers]).tolist()
        score, heads = self.column("score").tolist(), self.heads()
        return [
            heads[i] for i in sorted(range(len(heads)), key=lambda i: -score[i] if eligible[i] else 0) if eligible[i]
        ]

    def selected(self, top: float) -> list[Head]:
        """The distance heads: the `top` share of all heads, at least one, as far as so many are eligible."""
        check_top(top)
        return self.ranked()[: max(1, round(top * len(self.heads())))]

    def undefined(self) -> int:
        """Heads without a score: what they attend to, or the pairs that make their logits, never varies."""
        return int(self.column("score").isnan().sum())

    def lowest(self, count: int) -> list[Head]:
        """The `count` heads of the lowest score; heads without a score are left out."""
        score, heads = self.column("score"), self.heads()
        known = score.isnan().logical_not().nonzero()[:, 0]
        return [heads[int(i)] for i in known[score[known].argsort(stable=True)][:count]]


def check_top(top: float) -> None:
    """Raise ConfigError for a share that is not in (0, 1]."""
    if not 0 < top <= 1:
        raise ConfigError(f"top is {top:g}; give a share of the heads above 0 and at most 1.")


@torch.no_grad()
def distance_heads(subject: Subject, tokens_bt: Tensor, settings: DistanceSettings | None = None) -> HeadTable:
    """Score every head of every rotary layer.

    Args:
        tokens_bt: rows of equal length, each from one text; they are read one at a time.
        settings: how; None: `DistanceSettings()`.

    Raises:
        ConfigError: no layer rotates its queries and keys, two maps per head, unknown head groups, or attention that
            queries and keys alone do not explain.
        DataError: rows too short for the buckets of distance.
    """
    settings = settings or DistanceSettings()
    length = tokens_bt.shape[1]
    edges = settings.edges(length)
    rotary = _rotary_layers(subject)
    builders = {
        layer.index: SumsBuilder(layer.heads, layer.head_dim // 2, length, edges, settings.far, subject.device)
        for layer in rotary
    }
    queries_n, keys_n = random_pairs(length, RANDOM_PER_TOKEN * length, settings.skip_sink, settings.seed)
    drawn = queries_n.to(subject.device), keys_n.to(subject.device)

    def look(layer: AttentionLayer, activations: Activations) -> None:
        inputs = _inputs(layer, activations)
        if settings.pairs == "random":
            add_random(inputs, builders[layer.index], settings.skip_sink, drawn, settings.queries)
        else:
            add_attended(inputs, builders[layer.index], settings.skip_sink, settings.keys, settings.queries)

    for row_1t in tokens_bt.split(1):
        subject.visit(row_1t.to(subject.device), look, weights=settings.maps == "model", layers=list(builders))
    found = tuple(scores_of(index, builder.sums(), settings, edges) for index, builder in builders.items())
    skipped = tuple(layer.index for layer in subject.layers if layer.index not in builders)
    return HeadTable(found, edges, length, tokens_bt.shape[0], skipped, settings)


def scores_of(layer: int, sums: DistanceSums, settings: DistanceSettings, edges: Sequence[int]) -> LayerScores:
    """All numbers of one layer from its sums."""
    score = scores.score_named(settings.score)
    null = scores.permutation_null(sums, score, settings.null, settings.seed + layer)
    score_h = score(sums)
    first, last = list(edges), [*edges[1:], sums.mass_ht.shape[1]]
    mass_hz = torch.stack([sums.mass_ht[:, a:b].sum(1) for a, b in zip(first, last, strict=True)], 1)
    centre_hz = torch.stack([sums.centre_ht[:, a:b].sum(1) for a, b in zip(first, last, strict=True)], 1) / mass_hz
    return LayerScores(
        layer=layer,
        score_h=score_h.cpu(),
        z_h=null.z(score_h).cpu(),
        shift_h=scores.shift_score(sums).cpu(),
        far_h=scores.far_score(sums).cpu(),
        mean_distance_h=scores.mean_distance(sums).cpu(),
        share_beyond_h=scores.share_beyond(sums, sums.mass_ht.shape[1] / 4).cpu(),
        offset_mass_oh=torch.stack([scores.offset_mass(sums, offset) for offset in OFFSETS]).cpu(),
        usage_hm=scores.usage_profile(sums).cpu(),
        far_profile_hm=scores.far_profile(sums).cpu(),
        centre_hz=centre_hz.cpu(),
        parts_hzm=(sums.parts_hzm / sums.bucket_mass_hz[..., None]).cpu(),
    )


def _rotary_layers(subject: Subject) -> list[AttentionLayer]:
    rotary = [
        layer for layer in subject.layers if layer.rotation is not None and bool(layer.rotation.frequencies_m.any())
    ]
    if not rotary:
        raise ConfigError(
            f"{subject.describe()} has no rotary positions, and distance heads are defined by rotary frequencies; give a "
            "rotary model (Llama, Qwen, GPT-NeoX, a torchstone decoder with position rotary, …)."
        )
    for layer in rotary:
        if not layer.kv_heads or layer.heads % layer.kv_heads:
            raise ConfigError(
                f"layer {layer.name} has {layer.heads} query heads and {layer.kv_heads} key-value heads, which gives no "
                "groups of equal size; the model's configuration must state num_key_value_heads."
            )
    return rotary


def _inputs(layer: AttentionLayer, activations: Activations) -> LayerInputs:
    if activations.maps_per_head != 1:
        raise ConfigError(
            f"layer {layer.name} subtracts {activations.maps_per_head} attention maps per head, whose weights are signed; "
            "distance heads are defined for one map. Analyse a model with plain attention."
        )
    return LayerInputs(
        q_htd=activations.q_bhtd[0].float(),
        k_hsd=activations.k_bhsd[0].float(),
        v_hse=activations.v_bhse[0].float(),
        output_the=activations.heads_bthe[0].float(),
        weights_hts=None if activations.weights_bhts is None else activations.weights_bhts[0].float(),
        scale=activations.scale,
        window=layer.window,
    )
