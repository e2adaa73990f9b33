"""Kerple, logarithmic variant: subtract a learned multiple of the logarithm of the distance (Chi et al., arXiv 2205.09921).

    bias[h, i, j] = −p_h · ln(1 + a_h · (i − j)),   p_h, a_h ≥ 0.01

p starts uniform in (0, 2) and a in (0, 1), per head. Shapes: h heads · t queries · s keys.

Pitfalls
- The bound is a projection of the stored values, done in place at every forward pass. A clamp inside the graph would
  stop the gradient at the bound, and a head that ever reached it would stay there.
- Neither is decayed: weight decay pulls both to the bound, where the bias vanishes.
- Parameters and bias stay in fp32 in a model of half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from torchstone.nn.position.base import BiasedPosition, Offsets, PositionContext, ScoreTerm
from torchstone.nn.precision import Fine
from torchstone.recipe.part import Part

SMALLEST = 0.01


class Kerple(Fine, BiasedPosition):
    """Logarithmic biases with learned size and curvature per head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.empty(heads))
        self.a = nn.Parameter(torch.empty(heads))

    def bias(self, offsets: Offsets) -> Tensor:
        """−p · ln(1 + a · distance), [h, t, s]."""
        p_h, a_h = self._bounded()
        distance_ts = offsets.distance_ts.clamp_min(0).to(p_h.dtype)
        return -p_h[:, None, None] * torch.log1p(a_h[:, None, None] * distance_ts)

    def score_term(self, offsets: Offsets) -> ScoreTerm:
        """−p · ln(1 + a · distance), from a table of distances, whose gradient has few threads to an entry."""
        p_h, a_h = self._bounded()
        distance_n = torch.arange(offsets.distance_ts.shape[0], device=p_h.device)
        table_hn = -p_h[:, None] * torch.log1p(a_h[:, None] * distance_n)

        def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return table_hn[h, (i - j).clamp_min(0)]

        return term

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """p ~ U(0, 2) and a ~ U(0, 1), as the authors."""
        return {
            "p": lambda p, generator: p.uniform_(0.0, 2.0, generator=generator),
            "a": lambda a, generator: a.uniform_(0.0, 1.0, generator=generator),
        }

    def no_decay_parameters(self) -> tuple[str, ...]:
        """Neither is decayed."""
        return ("p", "a")

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """Both, projected in place.

        Unseen by autograd (`data`): projecting again changes nothing that a graph has kept, so two forward passes may
        come before a backward pass, compiled or not.
        """
        self.p.data.clamp_(min=SMALLEST)
        self.a.data.clamp_(min=SMALLEST)
        return self.p, self.a

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        return f"heads={self.p.shape[0]}"


class KerpleConfig(Part):
    """`position: kerple`."""

    family: ClassVar[str] = "position"
    kind: Literal["kerple"] = "kerple"

    def build(self, context: PositionContext) -> Kerple:
        """The module for this many heads."""
        return Kerple(context.heads)
