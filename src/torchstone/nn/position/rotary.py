"""Rotary position embedding: turn pairs of channels by an angle that grows with the position.

    (x₁, x₂) → (x₁ cos φ − x₂ sin φ,  x₂ cos φ + x₁ sin φ),   φ = position · base^(−2i/d)   for pair i of d/2
                                                                                   (Su et al., arXiv 2104.09864, eq. 34)

so that the product of a query and a key depends on the distance of their positions.

Shapes: b batch · t tokens · h heads · d head channels (even) · c = d/2 pairs.

`layout` says which channels make a pair, and is a convention of the weights:
  interleaved  channels 2i and 2i+1 (the paper, GPT-J, differential transformer)
  half         channels i and i+d/2 (GPT-NeoX, Hugging Face Llama)
Weights of one layout give wrong results in the other. The two agree up to a permutation of channels, and the products
of queries and keys do not see a permutation that both share: `arrange` therefore puts the rows of interleaved query and
key weights in half order, and `rotate` always turns halves, which contiguous vector instructions do well.

Angles are computed in fp64 and the tables are fp32, whatever the model's precision: in bf16 neighbouring positions
beyond 256 would share an angle. The tables are made once per forward pass and shared by all layers, so there is no
buffer that a conversion of the model could round, and no longest position.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.position.base import Position
from torchstone.nn.span import Span
from torchstone.recipe.part import Part

Layout = Literal["interleaved", "half"]


@torch.library.custom_op("torchstone::rotary_angles", mutates_args=())
def _angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_dim/2] of positions [...].

    An operator of its own, because a compiler that fuses it into the rotation computes fp64 sines for every element of
    every query and key.
    """
    exponent_c = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angle_tc = positions.double()[..., None] * base**-exponent_c
    return angle_tc.cos().float(), angle_tc.sin().float()


@_angles.register_fake
def _(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, head_dim // 2)
    return positions.new_empty(shape, dtype=torch.float32), positions.new_empty(shape, dtype=torch.float32)


class Rotary(Position):
    """Rotates queries and keys."""

    def __init__(self, head_dim: int, base: float, layout: Layout) -> None:
        super().__init__()
        if head_dim % 2:
            raise ConfigError(
                f"rotary position turns pairs of channels and head_dim is {head_dim}, which is odd; "
                "choose an even head_dim, or position: none."
            )
        self.head_dim, self.base, self.layout = head_dim, base, layout

    def rotate(self, q_bthd: Tensor, k_btgd: Tensor, span: Span, offset: int) -> tuple[Tensor, Tensor]:
        """Arranged queries and keys at the span's positions, or at offset, offset+1, … where it has none."""
        cos_t1c, sin_t1c = self.tables(span, q_bthd.shape[1], offset, q_bthd.device)
        return turn(q_bthd, cos_t1c, sin_t1c, "half"), turn(k_btgd, cos_t1c, sin_t1c, "half")

    def arrange(self, weight: Tensor) -> Tensor:
        """Rows [heads·d, …] of interleaved weights in half order; half weights as they are."""
        if self.layout == "half":
            return weight
        return weight.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    def tables(self, span: Span, length: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle, fp32 [t, 1, c], or [b, t, 1, c] for given positions."""

        def make() -> tuple[Tensor, Tensor]:
            positions = span.positions_bt
            if positions is None:
                positions = torch.arange(offset, offset + length, device=device)
            cos_tc, sin_tc = _angles(positions, self.head_dim, self.base)
            return cos_tc.unsqueeze(-2), sin_tc.unsqueeze(-2)

        return span.once(("rotary", self.head_dim, self.base, length, offset, device), make)

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        return f"head_dim={self.head_dim}, base={self.base:g}, layout={self.layout}"


def turn(x_bthd: Tensor, cos_t1c: Tensor, sin_t1c: Tensor, layout: Layout) -> Tensor:
    """x with every pair of channels turned, in fp32 or finer as the tables are, returned in the type of x."""
    if layout == "half":
        first, second = x_bthd.chunk(2, dim=-1)
    else:
        first, second = x_bthd.unflatten(-1, (-1, 2)).unbind(-1)
    turned_first = first * cos_t1c - second * sin_t1c
    turned_second = second * cos_t1c + first * sin_t1c
    if layout == "half":
        return torch.cat([turned_first, turned_second], dim=-1).to(x_bthd.dtype)
    return torch.stack([turned_first, turned_second], dim=-1).flatten(-2).to(x_bthd.dtype)


class RotaryConfig(Part):
    """`position: rotary`."""

    family: ClassVar[str] = "position"
    kind: Literal["rotary"] = "rotary"
    variant: Literal["full"] = Field(default="full", description="full: every pair of channels turns")
    layout: Layout = Field(default="interleaved", description="which channels make a pair")
    base: float = Field(default=10000.0, gt=1, description="wavelengths grow from 2π to 2π·base tokens")

    def build(self, head_dim: int) -> Rotary:
        """The module; raises ConfigError for an odd head_dim."""
        return Rotary(head_dim, self.base, self.layout)
