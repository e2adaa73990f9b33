"""ALiBi: subtract from every score a multiple of the distance (Press et al., arXiv 2108.12409).

    bias[h, i, j] = −slope_h · (i − j)

    heads a power of two:  slope_h = 2^(−8h/heads), h = 1 … heads
    otherwise:             the slopes of the next lower power of two, then every second slope of twice that power

Nothing is learned. Shapes: h heads · t queries · s keys.

Pitfall: rows reach −4096 at a length of 8192 and neighbouring distances are equal in bf16 beyond 256; the bias is fp32
whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torchstone.nn.position.base import BiasedPosition, Offsets, PositionContext, ScoreTerm
from torchstone.recipe.part import Part


def alibi_slopes(heads: int) -> list[float]:
    """The slope of every head, in the order of the heads."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
    between = [2.0 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return slopes + between[: heads - power]


class ALiBi(BiasedPosition):
    """Linear biases with fixed slopes."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = alibi_slopes(heads)

    def bias(self, offsets: Offsets) -> Tensor:
        """−slope · distance, fp32 [h, t, s]."""
        slopes_h11 = self._slopes(offsets.distance_ts.device)[:, None, None]
        return -slopes_h11 * offsets.distance_ts.clamp_min(0).float()

    def bias_key(self) -> Hashable:
        """Layers with as many heads share a bias."""
        return ("alibi", len(self.slopes))

    def score_term(self, offsets: Offsets) -> ScoreTerm:
        """−slope · distance."""
        slopes_h = self._slopes(offsets.distance_ts.device)

        def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return -slopes_h[h] * (i - j).clamp_min(0)

        return term

    def _slopes(self, device: torch.device) -> Tensor:
        return torch.tensor(self.slopes, dtype=torch.float32, device=device)

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        return f"heads={len(self.slopes)}"


class ALiBiConfig(Part):
    """`position: alibi`."""

    family: ClassVar[str] = "position"
    kind: Literal["alibi"] = "alibi"

    def build(self, context: PositionContext) -> ALiBi:
        """The module for this many heads."""
        return ALiBi(context.heads)
