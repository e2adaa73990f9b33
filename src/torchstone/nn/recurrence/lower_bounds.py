"""Hierarchical lower bounds of forget gates: the higher the layer, the less it may forget (HGRN, arXiv 2311.04823; HGRN2).

One learned matrix Γ for the whole model, P = softmax over its layers, and

    β_l = Σ_{m≤l} P_m − P_0 = P_1 + … + P_l

So β_0 = 0, β never falls from a layer to the next, and β of the last layer is 1 − P_0 < 1. Γ starts at 0: β_l = l / depth.

Shapes: l layers · d width of the model.

Pitfalls: the logarithms of β and of 1 − β are needed, and both may be tiny. 1 − β is therefore the sum of the other rows and
not a difference, and both are kept from 0. Rows of layers with another mixer (in a hybrid) take part in the softmax. Under
weight decay Γ is drawn to equal rows, which is where it starts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchstone.nn.precision import Fine
from torchstone.nn.roles import Roles

NAME = "hgrn2_lower_bounds"  # among the modules that layers share


class LowerBounds(Fine):
    """Γ [depth, width]."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(depth, width, dtype=torch.float32))

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        """β and 1 − β of a layer, [d] each, in fp32 or finer and above 0 (β of layer 0 is 0, and is not to be asked for)."""
        share_ld = self.gamma.softmax(dim=0)
        tiny = torch.finfo(share_ld.dtype).tiny
        beta_d = share_ld[1 : layer + 1].sum(0)
        rest_d = share_ld[0] + share_ld[layer + 1 :].sum(0)
        return beta_d.clamp_min(tiny), rest_d.clamp_min(tiny)

    @torch.no_grad()
    def values(self) -> Tensor:
        """β of every layer [l, d]."""
        share_ld = self.gamma.softmax(dim=0)
        return torch.cat([torch.zeros_like(share_ld[:1]), share_ld[1:].cumsum(0)])

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """Equal rows."""
        return {"gamma": lambda gamma, generator: gamma.zero_()}

    def parameter_roles(self) -> Roles:
        """Neither a projection nor an embedding."""
        return {"gamma": "other"}
