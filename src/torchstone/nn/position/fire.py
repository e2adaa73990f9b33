"""FIRE: a small network of the distance, relative to how far the query could look (Li et al., arXiv 2310.04418).

    bias[·, i, j] = W₂ φ(w₁ u + b₁) + b₂,    u = ln(|c δ| + 1) / (ln(|c max(i, L)| + 1) + ε),    L = |m L₀|

with δ = i − j and φ the rectifier. Dividing by the query's own position keeps u near [0, 1] at any length; below L,
where positions are few, distances count as they are. Learned: c (from 0.1), m (from 1) and the network 1 → D → heads.
L₀ is half the training length. Under a score processor φ is a leaky rectifier, as in the authors' DAPE-FIRE.

Shapes: b batch · h heads · t queries · s keys · p different positions · D width of the network · n scores.

Pitfalls
- i is the 0-based position of the query in its document, so short rows use L only. δ is by index, as for every bias.
- c and m are not decayed. Everything stays fp32 in a model of half precision and under autocast.
- With given positions the bias has a batch dimension, as rows of one batch may stand at different positions. The network
  then runs once for every position that occurs, not for every row; under `torch.compile`, which needs to know sizes
  beforehand, for every row.
- Its network is a matrix product, which `flops` of a mixer leaves out, as it leaves out all biases: it is made once for
  all rows and its share shrinks with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.position.base import BiasedPosition, Offsets, PositionContext, ScoreTerm
from torchstone.nn.precision import Fine
from torchstone.recipe.part import Part

EPS = 1e-6
LEAK = 0.01
LARGEST_CHUNK = 1 << 24  # hidden values that exist at once where no gradient needs them


class FIRENetwork(nn.Module):
    """The function of u: 1 → D → heads, with a rectifier that leaks `leak` of negative values."""

    def __init__(self, heads: int, width: int, leak: float) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.empty(width, 1))
        self.hidden_bias = nn.Parameter(torch.empty(width))
        self.out_weight = nn.Parameter(torch.empty(heads, width))
        self.out_bias = nn.Parameter(torch.empty(heads))
        self.leak = leak

    def forward(self, u_n: Tensor) -> Tensor:
        """Biases [heads, n]."""
        if torch.is_grad_enabled():
            return self._biases(u_n)
        rows = max(1, LARGEST_CHUNK // self.hidden_weight.shape[0])
        return torch.cat([self._biases(part_n) for part_n in u_n.split(rows)], dim=1)

    def _biases(self, u_n: Tensor) -> Tensor:
        hidden_Dn = F.leaky_relu(torch.addcmul(self.hidden_bias[:, None], self.hidden_weight, u_n), self.leak)
        return torch.addmm(self.out_bias[:, None], self.out_weight, hidden_Dn)

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """As torch's linear layers, uniform within ±1/√inputs; the decoder's small deviation would be no function."""
        inner = 1 / math.sqrt(self.out_weight.shape[1])
        bounds = {"hidden_weight": 1.0, "hidden_bias": 1.0, "out_weight": inner, "out_bias": inner}

        def uniform(bound: float) -> Callable[[Tensor, torch.Generator], object]:
            return lambda value, generator: value.uniform_(-bound, bound, generator=generator)

        return {name: uniform(bound) for name, bound in bounds.items()}


class FIRE(Fine, BiasedPosition):
    """Biases from a network of the relative distance."""

    def __init__(self, heads: int, length: int, width: int, leak: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.empty(()))
        self.m = nn.Parameter(torch.empty(()))
        self.threshold = float(length // 2)
        self.network = FIRENetwork(heads, width, leak)

    def bias(self, offsets: Offsets) -> Tensor:
        """The network of every relative distance, [h, t, s], or [b, h, t, s] for given positions."""
        with torch.autocast(offsets.distance_ts.device.type, enabled=False):
            if offsets.position.dim() == 2 and not torch.compiler.is_compiling():
                return self._looked_up(offsets)
            bias = self._direct(offsets.distance_ts.clamp_min(0), offsets.position)
        return bias if bias.dim() == 3 else bias.transpose(0, 1)

    def _direct(self, distance_ts: Tensor, position: Tensor) -> Tensor:
        """The network of every pair of a query's position and a distance, [h, …, s]."""
        u = self._relative(distance_ts.to(self.c.dtype), position.to(self.c.dtype).unsqueeze(-1))
        return self.network(u.flatten()).unflatten(1, u.shape)

    def _looked_up(self, offsets: Offsets) -> Tensor:
        """[b, h, t, s] out of a table of the positions that occur and all distances between s keys.

        Rows of a batch have most positions in common, and the network costs far more than a look-up. Larger distances are
        cut to the table: a query with such a distance to a key does not see it.
        """
        steps = offsets.distance_ts.shape[1]
        position_p, place_bt = offsets.position.unique(return_inverse=True)
        table_hps = self._direct(torch.arange(steps, device=position_p.device), position_p)
        rows_bths = table_hps.transpose(0, 1).index_select(0, place_bt.flatten()).unflatten(0, place_bt.shape)
        distance_t1s = offsets.distance_ts.clamp(0, steps - 1).unsqueeze(1)
        return rows_bths.gather(-1, distance_t1s.expand_as(rows_bths)).transpose(1, 2)

    def score_term(self, offsets: Offsets) -> ScoreTerm | None:
        """The network of one relative distance, its hidden values one after the other; None where gradients are due.

        Every score would add to the gradient of every weight, one at a time.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return None
        position, net = offsets.position, self.network
        c, threshold = self.c.clone(), (self.m * self.threshold).abs()
        hidden_weight, width = net.hidden_weight[:, 0], net.hidden_bias.shape[0]

        def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            here = position[i] if position.dim() == 1 else position[b, i]
            reach = (c * torch.maximum(here.to(c.dtype), threshold)).abs().log1p() + EPS
            u = (c * (i - j).clamp_min(0)).abs().log1p() / reach
            total = net.out_bias[h]
            for unit in range(width):
                value = hidden_weight[unit] * u + net.hidden_bias[unit]
                total = total + net.out_weight[h, unit] * torch.where(value > 0, value, net.leak * value)
            return total

        return term

    def _relative(self, distance_ts: Tensor, position_t1: Tensor) -> Tensor:
        """u of every score."""
        threshold = (self.m * self.threshold).abs()
        reach_t1 = (self.c * torch.maximum(position_t1, threshold)).abs().log1p() + EPS
        return (self.c * distance_ts).abs().log1p() / reach_t1

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """c starts at 0.1 and m at 1."""
        return {"c": lambda c, generator: c.fill_(0.1), "m": lambda m, generator: m.fill_(1.0)}

    def no_decay_parameters(self) -> tuple[str, ...]:
        """Zero is not neutral for either: it would end all distances, or the threshold."""
        return ("c", "m")

    def extra_repr(self) -> str:
        """Settings, for printing the model."""
        return f"threshold={self.threshold:g}, leak={self.network.leak:g}"


class FIREConfig(Part):
    """`position: fire`."""

    family: ClassVar[str] = "position"
    kind: Literal["fire"] = "fire"
    width: int = Field(default=32, gt=0, description="hidden values of the network")

    def build(self, context: PositionContext) -> FIRE:
        """The module; half the training length is its threshold, and under a score processor its rectifier leaks."""
        return FIRE(context.heads, context.length, self.width, LEAK if context.processed else 0.0)
