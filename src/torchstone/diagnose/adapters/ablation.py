"""Taking heads out of a layer, whatever made the model.

    zero     z_h ← 0
    mean     z_h ← mean of z_h over the batch and tokens of this forward pass
    window   z_h ← what the head computes when it sees only the last w tokens (the current one included)

z_h is the output of head h before the output projection. Zero is far from what the layers above have seen; the mean
leaves them a typical value; the window removes only long-range use.

Shapes: b batch · t tokens · h heads · e value channels.

Pitfall: the mean is that of the pass at hand, so rows must have one length and no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from torchstone.diagnose.subject import AblationMode, AttentionLayer, Head
from torchstone.errors import ConfigError

MODES = get_args(AblationMode)


@dataclass(frozen=True)
class Ablation:
    """One checked request: the heads of each layer, what is done to them, and the window if there is one."""

    heads: dict[int, tuple[int, ...]]
    mode: AblationMode
    window: int | None


def make_ablation(
    layers: Sequence[AttentionLayer], heads: Collection[Head], mode: AblationMode, window: int | None
) -> Ablation:
    """Check a request.

    Raises:
        ConfigError: an unknown mode, a head that does not exist, or a window that is missing, idle or no positive number.
    """
    if mode not in MODES:
        raise ConfigError(f"ablation mode {mode!r} does not exist; choose one of {', '.join(MODES)}.")
    if (mode == "window") != (window is not None):
        problem = "needs `window`, the number of tokens that the head may see" if window is None else "has no `window`"
        raise ConfigError(f"ablation mode {mode!r} {problem}; window is for mode 'window' only.")
    if window is not None and window < 1:
        raise ConfigError(f"window was given as {window}; a head sees at least 1 token, itself.")
    chosen: dict[int, tuple[int, ...]] = {}
    for layer, head in sorted(set(heads)):
        if not 0 <= layer < len(layers) or not 0 <= head < layers[layer].heads:
            counts = layers[layer].heads if 0 <= layer < len(layers) else layers[0].heads
            raise ConfigError(
                f"head ({layer}, {head}) does not exist; layers are 0 to {len(layers) - 1} and heads 0 to {counts - 1}."
            )
        chosen[layer] = (*chosen.get(layer, ()), head)
    return Ablation(chosen, mode, window)


def ablate_heads(
    heads_bthe: Tensor,
    layer: int,
    ablations: Iterable[Ablation],
    windowed: Callable[[tuple[int, ...], int], Tensor],
) -> Tensor:
    """Head outputs after all ablations, in their order.

    Args:
        heads_bthe: outputs of a layer.
        layer: its index.
        ablations: requests, of which some name heads of this layer.
        windowed: (heads, window) → outputs [b, t, len(heads), e] of these heads under that window.
    """
    for ablation in ablations:
        chosen = ablation.heads.get(layer)
        if not chosen:
            continue
        index = torch.tensor(chosen, device=heads_bthe.device)
        taken_btne = heads_bthe.index_select(2, index)
        if ablation.mode == "zero":
            put_btne = torch.zeros_like(taken_btne)
        elif ablation.mode == "mean":
            put_btne = taken_btne.mean(dim=(0, 1), keepdim=True).expand_as(taken_btne)
        else:
            assert ablation.window is not None
            put_btne = windowed(chosen, ablation.window).to(taken_btne.dtype)
        heads_bthe = heads_bthe.index_copy(2, index, put_btne)
    return heads_bthe
