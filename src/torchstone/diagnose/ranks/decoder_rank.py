"""Ranks of a decoder's attention products as a few numbers, cheap enough to log while it trains.

Means over all heads of all attention layers:

    effective_rank_qk, effective_rank_ov, pseudo_rank_qk, pseudo_rank_ov
    half_frobenius_over_nuclear_qk, _ov     ½(‖A‖² + ‖B‖²) / ‖AᵀB‖_* by key-value head (1: balanced), where it is defined

See `layer_products` for what they are of. Differential attention counts the query-key product of every sub-head. Nothing is run
and nothing changed: the model may be in the middle of training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchstone.diagnose.adapters.torchstone import TorchstoneLayer, has_projections
from torchstone.diagnose.ranks.layer_products import layer_products
from torchstone.diagnose.spectra import SHARE
from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder

RANK_NAMES = ("effective_rank", "pseudo_rank")


@torch.no_grad()
def rank_metrics(model: nn.Module, f: float = SHARE) -> dict[str, float]:
    """Means over the attention layers of a torchstone decoder; see the module's docstring.

    Args:
        model: a decoder, in training or not.
        f: share of the pseudo-rank.

    Raises:
        ConfigError: no decoder, or no block with attention. DataError: weights that are not finite.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"rank_metrics reads torchstone decoders, and a {type(model).__name__} was given; use "
            "torchstone.diagnose.ranks.attention_rank.attention_rank for other models."
        )
    found: dict[str, list[Tensor]] = {}
    for index, block in enumerate(model._blocks()):
        if not has_projections(block.mixer):
            continue
        layer = TorchstoneLayer(index, f"blocks.{index}.mixer", block.mixer, block.mixer_norm)
        for spectra in layer_products(layer):
            product, metrics = spectra.product.lower(), spectra.metrics(f)
            values = {f"{name}_{product}": metrics[name] for name in RANK_NAMES}
            if spectra.balance is not None:
                ratio_g = spectra.balance.ratio
                values[f"half_frobenius_over_nuclear_{product}"] = ratio_g[ratio_g.isfinite()]
            for name, value in values.items():
                found.setdefault(name, []).append(value)
    if not found:
        raise ConfigError(
            "the model has no attention mixer, so it has no attention products; give a model with attention."
        )
    return {name: float(torch.cat(values).mean()) for name, values in found.items() if torch.cat(values).numel()}
