"""Sums over pairs of tokens from which every distance score of a head is made.

For each pair of a query i and an earlier key j with weight α (the attention weight, or 1 for random pairs):

    centre of dimension   c = Σ_m x_m [g_m]₊ / Σ_m [g_m]₊      0: fast pairs make the logit, 1: slow pairs do
    kept by distance i-j  Σ α and Σ α c, which give correlation, null model and the curve of the centre
    kept by pair m        Σ α [g_m]₊ (usage), Σ α g_m by bucket of distance, Σ α g_m over far pairs

Nothing of the size pairs × m outlives one block of rows.

Shapes: h heads · n pairs of tokens · m frequency pairs · t distances (0 … length-1) · z buckets of distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.diagnose.rotary.pairs import relative_index


@dataclass(frozen=True, eq=False)
class DistanceSums:
    """Sums of one layer, fp64.

    Attributes:
        mass_ht, centre_ht: Σ α and Σ α c by distance, over pairs that have a centre.
        square_h: Σ α c².
        positive_hm: Σ α [g_m]₊.
        parts_hzm, bucket_mass_hz: Σ α g_m and Σ α by bucket of distance.
        far_hm, far_mass_h: Σ α g_m and Σ α over the pairs that are far.
        attention_ht: Σ of attention weights by distance over all queries and keys that count, 0 included.
        queries_t: number of pairs of positions at every distance.
        label_t: log2(1 + distance); the null model permutes it.
        index_m: x_m.
    """

    mass_ht: Tensor
    centre_ht: Tensor
    square_h: Tensor
    positive_hm: Tensor
    parts_hzm: Tensor
    bucket_mass_hz: Tensor
    far_hm: Tensor
    far_mass_h: Tensor
    attention_ht: Tensor
    queries_t: Tensor
    label_t: Tensor
    index_m: Tensor


class SumsBuilder:
    """Collects `DistanceSums` of one layer, block by block.

    Args:
        heads, pairs: query heads, and frequency pairs of a head.
        length: tokens of a sequence.
        buckets: rising lower edges of the buckets of distance, the first 1; the last bucket is open.
        far: pairs at least far · length apart are far.
        device: where the sums are kept.
    """

    def __init__(
        self, heads: int, pairs: int, length: int, buckets: Sequence[int], far: float, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.length, self.far = length, far * length
        self.index_m = relative_index(pairs).to(device)
        self.member_tr = _members(length, buckets, self.far).to(device)
        rows = len(buckets) + 1  # buckets, and far pairs
        self.mass_ht, self.centre_ht, self.square_h = zeros(heads, length), zeros(heads, length), zeros(heads)
        self.positive_hm, self.parts_hrm, self.mass_hr = (
            zeros(heads, pairs),
            zeros(heads, rows, pairs),
            zeros(heads, rows),
        )
        self.attention_ht, self.queries_t = zeros(heads, length), zeros(length)

    def add(self, parts_hnm: Tensor, weight_hn: Tensor, distance_hn: Tensor) -> None:
        """Take in pairs: their parts, weights (0 for pairs that do not count) and distances (int64)."""
        positive_hnm = parts_hnm.clamp(min=0)
        both_m2 = torch.stack([torch.ones_like(self.index_m), self.index_m], 1).to(parts_hnm.dtype)
        norm_hn, moment_hn = (positive_hnm @ both_m2).double().unbind(-1)
        weighted_hn = weight_hn.double() * (norm_hn > 0)
        centre_hn = moment_hn / torch.where(norm_hn > 0, norm_hn, 1)
        self.mass_ht.scatter_add_(1, distance_hn, weighted_hn)
        self.centre_ht.scatter_add_(1, distance_hn, weighted_hn * centre_hn)
        self.square_h += (weighted_hn * centre_hn.square()).sum(1)
        self.positive_hm += (weight_hn[:, None, :] @ positive_hnm)[:, 0].double()
        rows_hrn = (self.member_tr[distance_hn].to(weight_hn.dtype) * weight_hn[..., None]).transpose(1, 2)
        self.parts_hrm += (rows_hrn @ parts_hnm).double()
        self.mass_hr += rows_hrn.double().sum(-1)

    def add_attention(self, attention_ht: Tensor, queries_t: Tensor) -> None:
        """Take in attention weights by distance, and how many pairs of positions have each distance."""
        self.attention_ht += attention_ht
        self.queries_t += queries_t

    def sums(self) -> DistanceSums:
        """The sums so far."""
        distances_t = torch.arange(self.length, dtype=torch.float64, device=self.index_m.device)
        return DistanceSums(
            mass_ht=self.mass_ht, centre_ht=self.centre_ht, square_h=self.square_h, positive_hm=self.positive_hm,
            parts_hzm=self.parts_hrm[:, :-1], bucket_mass_hz=self.mass_hr[:, :-1],
            far_hm=self.parts_hrm[:, -1], far_mass_h=self.mass_hr[:, -1],
            attention_ht=self.attention_ht, queries_t=self.queries_t,
            label_t=torch.log2(1 + distances_t), index_m=self.index_m,
        )  # fmt: skip


def _members(length: int, buckets: Sequence[int], far: float) -> Tensor:
    """bool [t, z + 1]: which bucket each distance is in, and whether it is far."""
    distance_t1 = torch.arange(length)[:, None]
    begins_z = torch.tensor(buckets)
    ends_z = torch.tensor([*buckets[1:], length])
    return torch.cat([(distance_t1 >= begins_z) & (distance_t1 < ends_z), distance_t1 >= far], 1)
