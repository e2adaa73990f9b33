"""Two maps per head, one subtracted from the other: how sub-heads pair up in differential attention (arXiv 2410.05258).

Shapes: b batch · h heads · t queries; … any trailing dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """Pairs of sub-heads, the second of which is subtracted λ times.

    Attributes:
        lambda_bht: λ in fp32, of a shape that broadcasts to [b, h, t].
        neighbours: True where sub-heads 2i and 2i+1 are a pair, False where i and h+i are.
    """

    lambda_bht: Tensor
    neighbours: bool

    def pairs(self, x_bu: Tensor) -> Tensor:
        """[b, 2h, …] → [b, 2, h, …]."""
        return x_bu.unflatten(1, (-1, 2)).transpose(1, 2) if self.neighbours else x_bu.unflatten(1, (2, -1))

    def share(self, x_bh: Tensor) -> Tensor:
        """[b, h, …] → [b, 2h, …]: what belongs to a head, for both of its maps."""
        return x_bh.repeat_interleave(2, dim=1) if self.neighbours else torch.cat([x_bh, x_bh], dim=1)

    def subtract(self, x_but: Tensor) -> Tensor:
        """First minus λ times second, [b, 2h, t, …] → [b, h, t, …], in fp32 or finer; for maps and for outputs."""
        fine = torch.promote_types(x_but.dtype, torch.float32)
        first, second = self.pairs(x_but).to(fine).unbind(1)
        return first - self.lambda_bht.unsqueeze(-1) * second
