"""Rotary position embedding: turn pairs of channels by an angle that grows with the position.

    (x₁, x₂) → (x₁ cos φ − x₂ sin φ,  x₂ cos φ + x₁ sin φ),   φ = position · g_m / scale
                                                                                   (Su et al., arXiv 2104.09864, eq. 34)

so that the product of a query and a key depends on the distance of their positions. A head of d channels has n = d/2
pairs. `variant` and `p` say which turn, r = ⌊p·d/2⌋ of them (Barbero et al., arXiv 2410.06205):

  full      all:                g_m = base^(−2m/d),   m = 0 … n−1
  p         the r fastest:      g_0 … g_{r−1} of the full ladder; the rest stand still ("proportional" in Hugging Face)
  reversed  the r slowest:      g_{n−r} … g_{n−1} of the full ladder
  partial   the first 2r lanes, with a ladder of their own, base^(−2m/2r), down to the slowest (GPT-NeoX, Phi)

`p`, `reversed` and `partial` at the same share agree at position 0 and nowhere else; taking one for another shows up only
in long texts. `scale` divides positions (linear interpolation), which stretches the trained range over longer contexts.

Shapes: b batch · t tokens · h heads · d head channels (even) · c pairs that turn.

`layout` says which channels make a pair, and is a convention of the weights:
  interleaved  channels 2i and 2i+1 (the paper, GPT-J, differential transformer)
  half         channels i and i+d/2 (GPT-NeoX, Hugging Face Llama); partial: i and i+r of the first 2r
Weights of one layout give wrong results in the other. The two agree up to a permutation of channels, and the products
of queries and keys do not see a permutation that both share: `arrange` therefore puts the rows of query and key
weights in half order (pair m is channels m and m+d/2, whatever the variant), and `rotate` always turns halves, which
contiguous vector instructions do well. Pairs that stand still are copied.

Angles are computed in fp64 and the tables are fp32, whatever the model's precision: in bf16 neighbouring positions
beyond 256 would share an angle. The tables are made once per forward pass and shared by all layers, so there is no
buffer that a conversion of the model could round, and no longest position.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from torchstone.nn.position.base import Position, PositionContext
from torchstone.nn.position.ladder import Ladder, Variant, check_share, ladder
from torchstone.nn.span import Span
from torchstone.recipe.part import Part

Layout = Literal["interleaved", "half"]


@torch.library.custom_op("torchstone::rotary_angles", mutates_args=())
def _angles(
    positions: Tensor, first: int, pairs: int, denominator: int, base: float, scale: float
) -> tuple[Tensor, Tensor]:
    """cos and sin [..., pairs] of positions [...], for `pairs` steps of a ladder.

    An operator of its own, because a compiler that fuses it into the rotation computes fp64 sines for every element of
    every query and key.
    """
    frequency_c = Ladder(first, pairs, denominator, base, scale).frequencies(positions.device)
    angle_tc = positions.double()[..., None] * frequency_c
    return angle_tc.cos().float(), angle_tc.sin().float()


@_angles.register_fake
def _(positions: Tensor, first: int, pairs: int, denominator: int, base: float, scale: float) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, pairs)
    return positions.new_empty(shape, dtype=torch.float32), positions.new_empty(shape, dtype=torch.float32)


class Rotary(Position):
    """Rotates queries and keys; see the module's docstring.

    Args:
        head_dim: channels of a head, even.
        base: θ, above 1.
        layout: which channels of the weights make a pair.
        variant: which pairs turn.
        p: share of the pairs that turn; 1 for `full`.
        scale: what positions are divided by, 1 or more.

    Raises:
        ConfigError: odd head_dim, p outside [0, 1] or other than 1 under `full`, no lane to turn under `partial`, or a
            scale below 1.
    """

    def __init__(
        self,
        head_dim: int,
        base: float,
        layout: Layout,
        variant: Variant = "full",
        p: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_dim, self.base, self.layout = head_dim, base, layout
        self.variant, self.p, self.scale = variant, p, scale
        self.ladder = ladder(head_dim, base, variant, p, scale)
        # where the turning pairs stand in half order
        start = head_dim // 2 - self.ladder.pairs if variant == "reversed" else 0
        self.turning = slice(start, start + self.ladder.pairs)

    def frequencies(self) -> Tensor:
        """fp64 [d/2] on the CPU: radians per token of every pair in half order, 0 where a pair stands still."""
        frequency_m = torch.zeros(self.head_dim // 2, dtype=torch.float64, device="cpu")
        frequency_m[self.turning] = self.ladder.frequencies(torch.device("cpu"))
        return frequency_m

    def order(self) -> Tensor:
        """int64 [d] on the CPU: the channel of the weights that stands at each place of half order."""
        return self.arrange(torch.arange(self.head_dim, device="cpu"))

    def rotate(self, q_bthd: Tensor, k_btgd: Tensor, span: Span, offset: int) -> tuple[Tensor, Tensor]:
        """Arranged queries and keys at the span's positions, or at offset, offset+1, … where it has none."""
        if self.ladder.pairs == 0:
            return q_bthd, k_btgd
        cos_t1c, sin_t1c = self.tables(span, q_bthd.shape[1], offset, q_bthd.device)
        if self.ladder.pairs == self.head_dim // 2:
            return turn(q_bthd, cos_t1c, sin_t1c, "half"), turn(k_btgd, cos_t1c, sin_t1c, "half")
        return turn_some(q_bthd, cos_t1c, sin_t1c, self.turning), turn_some(k_btgd, cos_t1c, sin_t1c, self.turning)

    def arrange(self, weight: Tensor) -> Tensor:
        """Rows [heads·d, …] in half order: pair m is rows m and m + d/2 of a head."""
        if self.layout == "interleaved":
            return weight.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        turning, pairs = self.ladder.pairs, self.head_dim // 2
        if self.variant != "partial" or turning == pairs:
            return weight
        heads = weight.unflatten(0, (-1, self.head_dim))
        first, second, rest = heads.split([turning, turning, self.head_dim - 2 * turning], dim=1)
        still = rest.chunk(2, dim=1)
        return torch.cat([first, still[0], second, still[1]], dim=1).flatten(0, 1)

    def tables(self, span: Span, length: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles of all pairs that turn, fp32 [t, 1, c], or [b, t, 1, c] for given positions."""

        def make() -> tuple[Tensor, Tensor]:
            positions = span.positions_bt
            if positions is None:
                positions = torch.arange(offset, offset + length, device=device)
            cos_tc, sin_tc = _angles(positions, *self.ladder)
            return cos_tc.unsqueeze(-2), sin_tc.unsqueeze(-2)

        return span.once(("rotary", self.ladder, length, offset, device), make)

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        share = "" if self.variant == "full" else f", variant={self.variant}, p={self.p:g}"
        scale = "" if self.scale == 1 else f", scale={self.scale:g}"
        return f"head_dim={self.head_dim}, base={self.base:g}, layout={self.layout}{share}{scale}"


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


def turn_some(x_bthd: Tensor, cos_t1c: Tensor, sin_t1c: Tensor, turning: slice) -> Tensor:
    """x in half order with the pairs `turning` turned and the others copied."""
    first, second = x_bthd.chunk(2, dim=-1)
    a, b = first[..., turning], second[..., turning]
    moved = [(a * cos_t1c - b * sin_t1c).to(x_bthd.dtype), (b * cos_t1c + a * sin_t1c).to(x_bthd.dtype)]
    pieces = []
    for half, turned in zip((first, second), moved, strict=True):
        pieces += [half[..., : turning.start], turned, half[..., turning.stop :]]
    return torch.cat([piece for piece in pieces if piece.shape[-1]], dim=-1)


class RotaryConfig(Part):
    """`position: rotary`."""

    family: ClassVar[str] = "position"
    kind: Literal["rotary"] = "rotary"
    variant: Variant = Field(
        default="full", description="pairs that turn; p: the fastest, reversed: the slowest, partial: own ladder"
    )
    p: float | None = Field(
        default=None, ge=0, le=1, description="share of the pairs that turn; null: 1 under full, refused elsewhere"
    )
    layout: Layout = Field(default="interleaved", description="which channels make a pair")
    base: float = Field(default=10000.0, gt=1, description="wavelengths grow from 2π to 2π·base tokens")
    scale: float = Field(default=1.0, ge=1, description="what positions are divided by (linear interpolation)")

    @field_validator("p")
    @classmethod
    def _written_once(cls, p: float | None, info: ValidationInfo) -> float | None:
        """Under `full` 1 is null, so that a variant put in its place has to name a share of its own."""
        return None if p == 1 and info.data.get("variant") == "full" else p

    @model_validator(mode="after")
    def _fits(self) -> RotaryConfig:
        if self.p is not None:
            check_share(self.variant, self.p)
        elif self.variant != "full":
            raise ValueError(
                f"variant {self.variant} turns a share of the pairs and p, the share, is not given; give p, such as 0.75 (1 "
                "turns every pair), or choose variant full."
            )
        return self

    def build(self, context: PositionContext) -> Rotary:
        """The module; raises ConfigError where `Rotary` does."""
        share = 1.0 if self.p is None else self.p
        return Rotary(context.head_dim, self.base, self.layout, self.variant, share, self.scale)
