"""Block-diagonal dense map: the channels are cut into groups, and each group is mapped to itself.

    y_h = x_h W_h + b_h,   W_h of (d/h) × (d/h)

d²/h weights in place of d². Griffin (De et al., arXiv 2402.19427) makes its gates so, one group for each attention head of its
other layers.

Shapes: b batch · t tokens · h groups · i, o channels of a group before and after · d = h·i.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BlockDiagonal(nn.Module):
    """A square block-diagonal map with a bias.

    Args:
        width: channels, a multiple of `blocks`.
        blocks: groups.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        size = width // blocks
        self.weight = nn.Parameter(torch.empty(blocks, size, size))
        self.bias = nn.Parameter(torch.empty(blocks, size))

    def forward(self, x_btd: Tensor) -> Tensor:
        """[b, t, d] → [b, t, d]."""
        (y_btd,) = block_diagonal(x_btd, self)
        return y_btd

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2.0 * self.weight.numel()

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """Every block is drawn from N(0, 1/i), biases are zero."""
        std = self.weight.shape[1] ** -0.5
        return {
            "weight": lambda weight, generator: weight.normal_(0.0, std, generator=generator),
            "bias": lambda bias, generator: bias.zero_(),
        }


def block_diagonal(x_btd: Tensor, *maps: BlockDiagonal) -> tuple[Tensor, ...]:
    """Outputs [b, t, d] of several maps of one input with equal blocks, computed together, in the type of x."""
    blocks, size = maps[0].bias.shape
    x_hni = x_btd.reshape(-1, blocks, size).transpose(0, 1)
    weight_hio = torch.cat([one.weight for one in maps], dim=2).to(x_btd.dtype)
    bias_h1o = torch.cat([one.bias for one in maps], dim=1).to(x_btd.dtype).unsqueeze(1)
    y_hno = torch.baddbmm(bias_h1o, x_hni, weight_hio)
    return tuple(y_hni.transpose(0, 1).reshape(x_btd.shape) for y_hni in y_hno.split(size, dim=2))
