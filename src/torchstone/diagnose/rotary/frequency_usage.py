"""How much of its queries and keys a head keeps in each rotary frequency, and at which offset it looks.

The score of a query and a key is a sum over frequency pairs, and each pair can give at most the product of its two norms:

    |⟨q⁽ᵐ⁾, k⁽ᵐ⁾⟩| ≤ ‖q⁽ᵐ⁾‖ ‖k⁽ᵐ⁾‖                                        (Cauchy–Schwarz; Barbero et al., arXiv 2410.06205, § 4)

    usage of q by pair m   mean over tokens of ‖q⁽ᵐ⁾‖, of k likewise; rotation leaves norms as they are
    product                usage of q · usage of k: the most that the pair can matter; ranks the pairs of a key head
    slow, fast share       part of Σ product that the slowest and the fastest quarter of the pairs have
    slow energy            part of Σ ‖q⁽ᵐ⁾‖² in the slowest quarter; values, split the same way, are the control
    alignment              q_i·k_j / ‖q_i‖‖k_j‖ for j = i and j = i − 1, mean over tokens
    mass at offset −o      mean over queries of the weight on the key o tokens back, of Σ|weight|

Only queries with more than `OFFSETS` keys before them count for masses, so that offset −o never means the first token, on
which many heads park their weight.

Masses need a band of each attention map. It is computed again from queries and keys, a block of queries at a time
(`recomputed`), so that memory grows with the length and not with its square. Layers whose output such weights do not reproduce
(a cap, a bias, sinks, differential attention) are run once more, and their own maps are read, as few rows at a time as fit.

Shapes: b rows · u query sub-heads (= h, or 2h in differential attention) · h heads · t queries · s keys · m = d/2 pairs ·
n value pairs · g key heads · o offsets · l layers.

Pitfalls: "slow" goes by frequency, not by index: pairs that do not turn are the slowest, wherever they stand. A layer's own maps
are h·t·s numbers for each row, so that layers as those named above limit the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.diagnose.rotary.recomputed import LayerInputs, blocks, recomputed_error
from torchstone.diagnose.subject import Activations, AttentionLayer, Subject
from torchstone.errors import ConfigError, DataError

OFFSETS = 8  # offsets 0, -1, … -(OFFSETS - 1) are looked at
HELD_NUMBERS = 2**24  # numbers of one layer's queries, or of its attention maps, that are held at once
EXACT, EXACT_HALF = 1e-3, 0.05  # relative error of recomputed outputs up to which the weights are the model's own


@dataclass(frozen=True, eq=False)
class LayerUsage:
    """Usage of one layer, fp64.

    Attributes:
        layer: index of the layer.
        key_group: query sub-heads that share a key head.
        frequencies_m: radians per token; 0 where a pair does not turn.
        q_um, k_um: token means of pair norms, keys at each query sub-head.
        v_hn: the same of values, split into halves.
        q_energy_um, k_energy_um, v_energy_hn: token means of squared pair norms.
        aligned_u, aligned_previous_u: mean cosine of a query with its own key, and with the key before.
        mass_oh: mean weight at offset 0, -1, …
    """

    layer: int
    key_group: int
    frequencies_m: Tensor
    q_um: Tensor
    k_um: Tensor
    v_hn: Tensor
    q_energy_um: Tensor
    k_energy_um: Tensor
    v_energy_hn: Tensor
    aligned_u: Tensor
    aligned_previous_u: Tensor
    mass_oh: Tensor

    @property
    def product_um(self) -> Tensor:
        """Usage of q times usage of k."""
        return self.q_um * self.k_um

    @property
    def fastest_first_m(self) -> Tensor:
        """Pair indices by falling frequency; equal ones in their own order."""
        return self.frequencies_m.argsort(descending=True, stable=True)

    @property
    def slow_share_u(self) -> Tensor:
        """Part of the product in the slowest quarter of the pairs."""
        return share(self.product_um, self.fastest_first_m[-self.quarter :])

    @property
    def fast_share_u(self) -> Tensor:
        """Part of the product in the fastest quarter of the pairs."""
        return share(self.product_um, self.fastest_first_m[: self.quarter])

    @property
    def quarter(self) -> int:
        """Pairs in a quarter, at least one."""
        return max(1, len(self.frequencies_m) // 4)

    @property
    def slow_energy(self) -> tuple[float, float, float]:
        """Part of the squared norm in the slowest quarter: queries, keys, values; means over heads that are not all 0.

        Values have no frequencies: their pairs take the places of the queries' where there are as many, else they keep
        their own order.
        """
        slow_m, pairs = self.fastest_first_m[-self.quarter :], self.v_energy_hn.shape[1]
        slow_n = slow_m if pairs == len(self.frequencies_m) else torch.arange(pairs)[-max(1, pairs // 4) :]
        q, k = (share(energy_um, slow_m) for energy_um in (self.q_energy_um, self.k_energy_um))
        return float(q.nanmean()), float(k.nanmean()), float(share(self.v_energy_hn, slow_n).nanmean())

    def ranking(self) -> Tensor:
        """int64 [g, m]: the pairs of each key head by falling product, mean over the query heads that read it."""
        product_gm = self.product_um.unflatten(0, (-1, self.key_group)).mean(dim=1)
        return product_gm.argsort(dim=1, descending=True, stable=True)

    def best_offset(self) -> tuple[Tensor, Tensor]:
        """Offset (0, -1, …) with the most mass and that mass, [h] each."""
        mass_h, place_h = self.mass_oh.max(dim=0)
        return -place_h, mass_h


def share(x_um: Tensor, chosen: Tensor) -> Tensor:
    """Part of every row's sum that the chosen columns have; NaN where the row is 0."""
    total_u = x_um.sum(dim=1)
    return torch.where(total_u > 0, x_um[:, chosen].sum(dim=1) / total_u.clamp_min(1e-300), torch.nan)


def pair_norms(x_bhtd: Tensor) -> Tensor:
    """Norm of every pair (channels m and m + d/2), [b, h, t, m], fp64; the last channel of an odd number is left out."""
    pairs = x_bhtd.shape[-1] // 2
    return torch.hypot(x_bhtd[..., :pairs].double(), x_bhtd[..., pairs : 2 * pairs].double())


def rotary_layers(subject: Subject) -> list[int]:
    """Indices of the layers that turn queries and keys; raises ConfigError where there are none."""
    found = [layer.index for layer in subject.layers if layer.rotation is not None]
    if not found:
        raise ConfigError(
            f"{subject.name}: no rotary module found; found {positions_of(subject)}. Frequencies exist only where positions "
            "turn queries and keys; give a model with rotary position embedding."
        )
    return found


def positions_of(subject: Subject) -> str:
    """How a model without rotation tells positions, in words, as far as its modules show."""
    from torchstone.nn.position.base import Position

    for name, module in subject.model.named_modules():
        if isinstance(module, Position):
            return f"position kind {type(module).__module__.rpartition('.')[2]}"
        last = name.rpartition(".")[2]
        if last in ("wpe", "embed_positions", "position_embeddings", "position_embedding"):
            return f"learned positions ({name})"
    if getattr(getattr(subject.model, "config", None), "alibi", False):
        return "position kind alibi"
    return "no module of positions that is known here"


def frequency_usage(subject: Subject, tokens_bt: Tensor) -> tuple[LayerUsage, ...]:
    """Usage of every rotary layer, with one layer's activations held at a time.

    Args:
        subject: the model.
        tokens_bt: rows of at least OFFSETS + 1 tokens.

    Raises:
        ConfigError: no layer is rotary.
        DataError: the rows are too short.
    """
    layers = rotary_layers(subject)
    length = tokens_bt.shape[1]
    if length <= OFFSETS:
        raise DataError(
            f"text too short: rows of {length} tokens, and offsets need at least {OFFSETS + 1}; give longer texts or a "
            "larger length."
        )
    half = next(subject.model.parameters()).dtype.itemsize < 4
    sums: dict[int, _Sums] = {}
    unexplained: set[int] = set()

    def look(layer: AttentionLayer, seen: Activations) -> None:
        found = sums.setdefault(layer.index, _Sums(layer, seen))
        found.add(seen)
        if layer.index not in unexplained and not found.add_recomputed(layer, seen, EXACT_HALF if half else EXACT):
            unexplained.add(layer.index)

    def read(layer: AttentionLayer, seen: Activations) -> None:
        assert seen.weights_bhts is not None
        sums[layer.index].add_masses(_masses(seen.weights_bhts))

    channels = max(subject.layers[index].heads * subject.layers[index].head_dim for index in layers)
    for rows_bt in tokens_bt.split(max(1, HELD_NUMBERS // (channels * length))):
        subject.visit(rows_bt, look, layers=layers)
    for index in unexplained:
        sums[index].forget_masses()
    heads = max(subject.layers[index].heads for index in layers)
    for rows_bt in tokens_bt.split(max(1, HELD_NUMBERS // (heads * length * length))) if unexplained else ():
        subject.visit(rows_bt, read, weights=True, layers=sorted(unexplained))
    return tuple(sums[index].usage() for index in layers)


class _Sums:
    """Running sums of one layer over rows."""

    def __init__(self, layer: AttentionLayer, seen: Activations) -> None:
        assert layer.rotation is not None
        self.layer, self.frequencies_m = layer.index, layer.rotation.frequencies_m.double().cpu()
        self.key_group = layer.heads // layer.kv_heads if seen.maps_per_head == 1 else 1
        self.rows = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, seen: Activations) -> None:
        """Add the means over tokens of every row, except masses."""
        for name, x_bhtd in (("q", seen.q_bhtd), ("k", seen.k_bhsd), ("v", seen.v_bhse)):
            norms_bhtm = pair_norms(x_bhtd)
            self._add(f"{name}_um", norms_bhtm.mean(dim=2))
            self._add(f"{name}_energy_um", norms_bhtm.square().mean(dim=2))
        self._add("aligned_u", _cosines(seen.q_bhtd, seen.k_bhsd))
        self._add("aligned_previous_u", _cosines(seen.q_bhtd[:, :, 1:], seen.k_bhsd[:, :, :-1]))
        self.rows += seen.q_bhtd.shape[0]

    def add_recomputed(self, layer: AttentionLayer, seen: Activations, exact: float) -> bool:
        """Add every row's masses from queries and keys; False, and nothing added, where these do not explain the output.

        Args:
            exact: relative error of the output up to which they do.
        """
        if seen.maps_per_head != 1:
            return False
        rows = [
            LayerInputs(q_htd, k_hsd, v_hse, output_the, None, seen.scale, layer.window)
            for q_htd, k_hsd, v_hse, output_the in zip(
                seen.q_bhtd, seen.k_bhsd, seen.v_bhse, seen.heads_bthe, strict=True
            )
        ]
        if not all(recomputed_error(row) <= exact for row in rows):
            return False
        self.add_masses(torch.stack([_recomputed_masses(row) for row in rows]))
        return True

    def add_masses(self, mass_bho: Tensor) -> None:
        """Add masses of some rows."""
        self._add("mass_ho", mass_bho)

    def forget_masses(self) -> None:
        """Start the masses again."""
        self.sums.pop("mass_ho", None)

    def _add(self, name: str, values_b: Tensor) -> None:
        total = values_b.sum(dim=0).cpu()
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def usage(self) -> LayerUsage:
        """Means over rows."""
        means = {name: total / self.rows for name, total in self.sums.items()}
        return LayerUsage(
            layer=self.layer,
            key_group=self.key_group,
            frequencies_m=self.frequencies_m,
            mass_oh=means.pop("mass_ho").T,
            v_hn=means.pop("v_um"),
            v_energy_hn=means.pop("v_energy_um"),
            **means,
        )


def _cosines(q_butd: Tensor, k_butd: Tensor) -> Tensor:
    """Mean over tokens of the cosine of queries and keys at equal places, [b, u]."""
    return torch.cosine_similarity(q_butd.double(), k_butd.double(), dim=-1).mean(dim=2)


def _masses(weights_bhts: Tensor) -> Tensor:
    """Mean over queries of the share of weight at each offset, [b, h, o]."""
    total_bht = weights_bhts.abs().sum(dim=-1).clamp_min(torch.finfo(weights_bhts.dtype).tiny)
    kept = [
        weights_bhts.diagonal(-o, dim1=-2, dim2=-1)[..., OFFSETS - o :] / total_bht[..., OFFSETS:]
        for o in range(OFFSETS)
    ]
    return torch.stack([mass_bht.double().mean(dim=-1) for mass_bht in kept], dim=-1)


def _recomputed_masses(row: LayerInputs) -> Tensor:
    """The same [h, o] of one row whose weights are computed again; they are positive and add up to 1."""
    heads = row.q_htd.shape[0]
    sum_ho = row.q_htd.new_zeros(heads, OFFSETS, dtype=torch.float64)
    offsets_o = torch.arange(OFFSETS, device=row.q_htd.device)
    for block in blocks(row, None, 1):
        if block.stop <= OFFSETS:
            continue
        weights_hrs = row.rows(block)
        counted_r = torch.arange(max(block.start, OFFSETS), block.stop, device=offsets_o.device)
        keys_ro = counted_r[:, None] - offsets_o
        mass_hro = weights_hrs[:, counted_r - block.start].gather(2, keys_ro.expand(heads, -1, -1))
        sum_ho += mass_hro.double().sum(dim=1)
    return sum_ho / (row.length - OFFSETS)
