"""How far one update moved one matrix: in weights, in direction, and in what a layer computes.

Kosson, Messmer and Jaggi (arXiv 2410.23922) ask by which measure early updates are too large. With Δ = W′ − W:

    l2        ‖Δ‖          rms ‖Δ‖/√(numbers)          relative ‖Δ‖/‖W‖
    angle     between W and W′, of the whole matrix as one vector, and of each neuron (row)
    rrc       ‖X Δᵀ‖/‖X Wᵀ‖ on inputs X of the layer: relative change of what it computes, with its input unchanged

The angle is taken from the part of Δ across W, not from the cosine, which is 1 to rounding for angles below 3e-4 in
fp32:

    angle = atan2( √(‖Δ‖² ‖W‖² − ⟨W, Δ⟩²),  ‖W‖² + ⟨W, Δ⟩ )

Sums over a row are in fp32 (fp64 for fp64 weights), everything after them in fp64. So one pass over W and Δ gives all
numbers but the last, for rows and for the whole.

Shapes: o neurons (outputs) · i inputs · n rows of inputs. Dimensions after the first count as inputs.

Pitfall: a row of zeros has no direction; its angle is nan, and so is the relative change of a response that was zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = {"cpu": 1 << 18, "cuda": 1 << 25}  # numbers of a block of rows; on a CPU small enough for its cache
VANISHED = 1e-12  # share of ‖W‖² that counts as a matrix of zeros


@dataclass(frozen=True, eq=False)
class Change:
    """What one update did to one matrix.

    Attributes:
        squares_o: ‖w‖² of every neuron before. crossed_o: ⟨w, δ⟩. moved_o: ‖δ‖². All fp64.
        numbers: of the matrix.
        response_o, responded_o: ‖X w‖² and ‖X δ‖² of every neuron, fp64; None without inputs.
    """

    squares_o: Tensor
    crossed_o: Tensor
    moved_o: Tensor
    numbers: int
    response_o: Tensor | None = None
    responded_o: Tensor | None = None

    @property
    def moved(self) -> float:
        """‖Δ‖²."""
        return float(self.moved_o.sum())

    @property
    def square(self) -> float:
        """‖W‖²."""
        return float(self.squares_o.sum())

    @property
    def angle(self) -> float:
        """Radians between the whole matrix before and after."""
        return float(_angle(self.squares_o.sum(), self.crossed_o.sum(), self.moved_o.sum()))

    @property
    def neuron_angles_o(self) -> Tensor:
        """Radians between every row before and after."""
        return _angle(self.squares_o, self.crossed_o, self.moved_o)

    @property
    def rrc(self) -> float | None:
        """Relative change of the layer's response; None without inputs."""
        if self.response_o is None or self.responded_o is None:
            return None
        return float((self.responded_o.sum() / self.response_o.sum()).sqrt())

    @property
    def neuron_rrcs_o(self) -> Tensor | None:
        """Relative change of every neuron's response; None without inputs."""
        if self.response_o is None or self.responded_o is None:
            return None
        return (self.responded_o / self.response_o).sqrt()


def change_of(before: Tensor, after: Tensor, inputs_ni: Tensor | None = None) -> Change:
    """The change from `before` to `after`, both [out, …].

    Args:
        inputs_ni: rows that the layer read, for the relative representation change; None leaves it out.
    """
    before_oi, after_oi = before.flatten(1), after.flatten(1)
    fine = torch.promote_types(before.dtype, torch.float32)
    inputs_ni = None if inputs_ni is None else inputs_ni.to(fine)
    rows = max(1, BLOCK.get(before.device.type, BLOCK["cuda"]) // before_oi.shape[1])
    parts = [
        _sums(old_oi.to(fine), new_oi.to(fine), inputs_ni)
        for old_oi, new_oi in zip(before_oi.split(rows), after_oi.split(rows), strict=True)
    ]
    squares_o, crossed_o, moved_o, *responses = (torch.cat(column).double() for column in zip(*parts, strict=True))
    return Change(squares_o, crossed_o, moved_o, before.numel(), *responses)


def _sums(old_oi: Tensor, new_oi: Tensor, inputs_ni: Tensor | None) -> tuple[Tensor, ...]:
    """‖w‖², ⟨w, δ⟩ and ‖δ‖² of every row, and with inputs ‖X w‖² and ‖X δ‖²."""
    delta_oi = new_oi - old_oi
    found = (_squares(old_oi), (old_oi * delta_oi).sum(1), _squares(delta_oi))
    if inputs_ni is None:
        return found
    return (*found, _squares(old_oi @ inputs_ni.T), _squares(delta_oi @ inputs_ni.T))


def _squares(values_oi: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values_oi, dim=1).square_()


def _angle(square: Tensor, crossed: Tensor, moved: Tensor) -> Tensor:
    across = (moved * square - crossed**2).clamp(min=0).sqrt()
    angle = torch.atan2(across, square + crossed)
    after = square + 2 * crossed + moved
    return angle.masked_fill((square <= 0) | (after <= VANISHED * square), torch.nan)
