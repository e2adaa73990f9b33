"""The frequencies of rotary position: which steps of base^(−2m/denominator) a variant keeps.

Pitfall: `p` keeps the denominator d of the full ladder, `partial` has its own, 2r. Implementations that confuse them
agree on short texts. The product p·d/2 is rounded before it is cut: 0.29 of 200 channels is 28.999999999999996, 28 pairs.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchstone.errors import ConfigError

Variant = Literal["full", "p", "partial", "reversed"]
WHOLE = 1e-12  # how far above a whole number, relative to all pairs, rounding alone puts p·d/2


class Ladder(NamedTuple):
    """`pairs` frequencies base^(−2m/denominator)/scale, m = first, first+1, …"""

    first: int
    pairs: int
    denominator: int
    base: float
    scale: float

    def frequencies(self, device: torch.device) -> Tensor:
        """fp64 [pairs], radians per token."""
        step_c = torch.arange(self.first, self.first + self.pairs, device=device, dtype=torch.float64)
        return self.base ** (-2 * step_c / self.denominator) / self.scale


def kept_pairs(head_dim: int, p: float) -> int:
    """r = ⌊p·d/2⌋, in the order of operations of the authors' code: multiply, floor-divide."""
    return int(p * head_dim // 2)


def least_share(head_dim: int, pairs: int) -> float:
    """The smallest p, up to rounding, that keeps so many pairs: 2r/d, or the next number that rounds to no fewer."""
    p = 2 * pairs / head_dim
    while kept_pairs(head_dim, p) < pairs:
        p = math.nextafter(p, 1.0)
    return p


def ladder(head_dim: int, base: float, variant: Variant, p: float, scale: float) -> Ladder:
    """The frequencies of a variant.

    Raises:
        ConfigError: see `nn.position.rotary.Rotary`. Warns where p keeps no pair or cuts one.
    """
    _check_sizes(head_dim, scale)
    check_share(variant, p)
    pairs = head_dim // 2
    if variant == "full":
        return Ladder(0, pairs, head_dim, base, scale)
    kept = kept_pairs(head_dim, p)
    if variant == "partial":
        if kept == 0:
            raise ConfigError(
                f"rotary variant partial with p {p:g} of {head_dim} channels has 2r = 0 lanes to turn; "
                f"give p of at least {2 / head_dim:g}, or position: none."
            )
    elif kept == 0:
        warnings.warn(f"rotary variant {variant} with p {p:g} turns no pair of {pairs}: no position", stacklevel=2)
    exact = p * head_dim / 2
    if exact - kept > WHOLE * pairs:
        warnings.warn(
            f"p {p!r} of {pairs} rotary pairs is {exact!r}, no whole number: {kept} turn; p "
            f"{least_share(head_dim, kept + 1)!r} turns {kept + 1}",
            stacklevel=2,
        )
    if variant == "partial":
        return Ladder(0, kept, 2 * kept, base, scale)
    return Ladder(0 if variant == "p" else pairs - kept, kept, head_dim, base, scale)


def _check_sizes(head_dim: int, scale: float) -> None:
    if head_dim % 2:
        raise ConfigError(
            f"rotary position turns pairs of channels and head_dim is {head_dim}, which is odd; "
            "choose an even head_dim, or position: none."
        )
    if not scale >= 1:
        raise ConfigError(f"rotary scale is {scale:g}; it divides positions and must be 1 or more.")


def check_share(variant: Variant, p: float) -> None:
    """Raise ConfigError unless p is a share, and 1 where every pair turns."""
    if not 0 <= p <= 1:
        raise ConfigError(f"rotary p is {p:g}; it is the share of pairs that turn and lies between 0 and 1.")
    if variant == "full" and p != 1:
        raise ConfigError(
            f"rotary variant full turns every pair and p {p:g} was given; leave p at 1, or choose variant p (the "
            "fastest share), reversed (the slowest) or partial (the first lanes, with their own ladder)."
        )
