"""The head products of one attention layer: spectra of the weights in use, balance of the weights as trained.

Ranks are those of the products that the data meet, with the gains of the norms around the projections multiplied in
(`AttentionLayer.weights`). Balance speaks of the parameters that weight decay acts on, so it uses the projections alone; where
queries and keys pass a norm, the loss does not depend on the scale of the product, the theory does not apply, and there is
no balance for QK.

Shapes: c offsets δ · h heads · g key-value heads · n singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchstone.diagnose.ranks.head_products import Balance, HeadProducts, balance
from torchstone.diagnose.spectra import SHARE, spectral_metrics
from torchstone.diagnose.subject import AttentionLayer, HeadWeights, ProjectionName
from torchstone.errors import ConfigError, DataError

Product = Literal["QK", "OV"]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ProductSpectra:
    """Spectra of one product of one layer.

    Attributes:
        layer: index of the layer.
        product: QK or OV.
        values_chn: singular values at every offset (one for OV, which no position rotates).
        shared_of: the key-value head of every head.
        balance: by key-value head; None where it is not defined or there are no projections of its own.
    """

    layer: int
    product: Product
    values_chn: Tensor
    shared_of: tuple[int, ...]
    balance: Balance | None

    def metrics(self, f: float = SHARE) -> dict[str, Tensor]:
        """Norms and ranks of every head [h], averaged over offsets; names as in `spectra`."""
        return {name: value_ch.mean(0) for name, value_ch in spectral_metrics(self.values_chn, f).items()}


def layer_products(
    layer: AttentionLayer, rope_delta: Sequence[int] = (0,), change: Change | None = None, balanced: bool = True
) -> tuple[ProductSpectra, ProductSpectra]:
    """Spectra of QK and OV of a layer.

    Args:
        layer: of a subject.
        rope_delta: offsets δ (query minus key position, in tokens) at which QK is taken.
        change: what is done to every factor before the spectra are taken (a control).
        balanced: whether balance is wanted, which takes about a third of the time.

    Raises:
        ConfigError: quantised weights, or factors that the model does not have. DataError: weights that are not finite.
    """
    weights = layer.weights()
    factors = weights.q_hdw, weights.k_gdw, weights.v_gew, weights.o_hwe.mT
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise DataError(
            f"attention layer {layer.index} ({layer.name}) has weights that are not finite; use another checkpoint."
        )
    q_hdw, k_gdw, v_gew, o_hew = factors if change is None else map(change, factors)
    keys, values = shared_heads(weights)
    qk, ov = HeadProducts(k_gdw, q_hdw, keys), HeadProducts(v_gew, o_hew, values)
    return (
        ProductSpectra(
            layer=layer.index,
            product="QK",
            values_chn=_at_offsets(qk, layer, rope_delta),
            shared_of=keys,
            balance=_balance(layer, weights, "QK") if balanced and not weights.normalised_qk else None,
        ),
        ProductSpectra(
            layer=layer.index,
            product="OV",
            values_chn=ov.singular_values().unsqueeze(0),
            shared_of=values,
            balance=_balance(layer, weights, "OV") if balanced else None,
        ),
    )


def shared_heads(weights: HeadWeights) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The key head of every query head, and the value head of every output head."""
    queries, keys = weights.q_hdw.shape[0], weights.k_gdw.shape[0]
    heads, values = weights.o_hwe.shape[0], weights.v_gew.shape[0]
    return tuple(h * keys // queries for h in range(queries)), tuple(h * values // heads for h in range(heads))


def bare_factors(layer: AttentionLayer, weights: HeadWeights, product: Product) -> tuple[Tensor, Tensor]:
    """The shared and the own factors of a product as trained, without gains of norms: [g, d, w] and [h, d, w].

    Raises:
        ConfigError: the layer has no projections of its own, or orders its heads in another way than its keys are shared
            (differential attention with grouped keys).
    """
    queries, keys = weights.q_hdw.shape[0], weights.k_gdw.shape[0]
    if product == "QK" and keys not in (queries, layer.kv_heads):
        raise ConfigError(
            f"attention layer {layer.index} ({layer.name}) shares {keys} key sub-heads among {queries} query sub-heads in an "
            "order of its own, for which the factors of its query-key products are not told apart; use a model without "
            "grouped keys."
        )
    names: tuple[ProjectionName, ProjectionName] = ("k", "q") if product == "QK" else ("v", "o")
    counts = (keys, queries) if product == "QK" else (weights.v_gew.shape[0], weights.o_hwe.shape[0])
    shared, own = (layer.projection(which).weight().double() for which in names)
    own = own.mT if product == "OV" else own
    return shared.unflatten(0, (counts[0], -1)), own.unflatten(0, (counts[1], -1))


def _at_offsets(qk: HeadProducts, layer: AttentionLayer, rope_delta: Sequence[int]) -> Tensor:
    """Singular values at every offset [c, h, n]; the rotation is looked at only where it matters."""
    rotation = layer.rotation if any(rope_delta) else None
    frequencies_m = None if rotation is None else rotation.frequencies_m
    return torch.stack([qk.singular_values(delta, frequencies_m) for delta in rope_delta])


def _balance(layer: AttentionLayer, weights: HeadWeights, product: Product) -> Balance | None:
    try:
        factors = bare_factors(layer, weights, product)
    except ConfigError:
        return None
    return balance(*factors, shared_heads(weights)[0 if product == "QK" else 1])
