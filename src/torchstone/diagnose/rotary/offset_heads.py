"""Offset heads: heads that put nearly all of their attention on one fixed offset, such as the token before
(Barbero et al., arXiv 2410.06205, where they are called positional heads).

Shapes: h heads · o offsets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torchstone.diagnose.rotary.frequency_usage import LayerUsage

THRESHOLD = 0.9


@dataclass(frozen=True)
class OffsetHead:
    """A head that looks at one offset.

    Attributes:
        layer, head: where it is.
        offset: 0 for the token itself, -1 for the one before, …
        mass: mean weight there.
    """

    layer: int
    head: int
    offset: int
    mass: float


def offset_heads(usage: Iterable[LayerUsage], threshold: float = THRESHOLD) -> list[OffsetHead]:
    """Heads with at least `threshold` of their weight on one of the offsets 0, -1, … -(OFFSETS - 1), most mass first."""
    found = []
    for layer in usage:
        offset_h, mass_h = layer.best_offset()
        for head in (mass_h >= threshold).nonzero().flatten().tolist():
            found.append(OffsetHead(layer.layer, head, int(offset_h[head]), float(mass_h[head])))
    return sorted(found, key=lambda head: -head.mass)
