"""Scores of a head from its distance sums, and what chance gives.

    shift   Pearson correlation, weighted by α, of the centre of dimension with log2(1 + i - j): above 0, slow pairs
            take over with distance
    far     Pearson correlation over pairs m of x_m with Σ α g_m over far pairs: above 0, slow pairs make the far logits

The paper (arXiv 2410.08703) was not open to us in full and has no released code; these are this project's operational
definitions of its idea. `SCORES` names them, and any function of `DistanceSums` may be used in their place:

    SCORES["paper"] = lambda sums: ...        # [h]

Null model: the distances are given to other pairs at random, within each head. All pairs at one distance move together,
because they are not independent: they share the rotation. The control for what remains (a rotation makes the
centre a smooth function of distance even without training) is an untrained model of the same shape.

Shapes: h heads · t distances · m frequency pairs · n permutations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchstone.diagnose.distance.sums import DistanceSums
from torchstone.errors import ConfigError

Score = Callable[[DistanceSums], Tensor]


def shift_score(sums: DistanceSums) -> Tensor:
    """Weighted correlation [h] of centre of dimension and log distance; nan where either is constant."""
    total_h = sums.mass_ht.sum(1)
    label_h = sums.mass_ht @ sums.label_t / total_h
    centre_h = sums.centre_ht.sum(1) / total_h
    offset_ht = sums.label_t - label_h[:, None]
    covariance_h = (sums.centre_ht * offset_ht).sum(1) / total_h
    label_variance_h = (sums.mass_ht * offset_ht.square()).sum(1) / total_h
    centre_variance_h = sums.square_h / total_h - centre_h.square()
    return covariance_h / (label_variance_h * centre_variance_h.clamp(min=0)).sqrt()


def far_score(sums: DistanceSums) -> Tensor:
    """Correlation [h] over pairs of x_m and the far profile; nan where nothing far is attended."""
    profile_hm = far_profile(sums)
    profile_hm = profile_hm - profile_hm.mean(1, keepdim=True)
    index_m = sums.index_m - sums.index_m.mean()
    return (profile_hm @ index_m) / (profile_hm.square().sum(1) * index_m.square().sum()).sqrt()


SCORES: dict[str, Score] = {"shift": shift_score, "far": far_score}


def score_named(name: str | Score) -> Score:
    """The score of that name, or the function given; raises ConfigError naming the scores there are."""
    if callable(name):
        return name
    if name not in SCORES:
        raise ConfigError(f"there is no distance score {name!r}; known: {', '.join(SCORES)}. A function may be given.")
    return SCORES[name]


def far_profile(sums: DistanceSums) -> Tensor:
    """Mean part [h, m] of far pairs, weighted by α; nan where nothing far is attended."""
    return sums.far_hm / sums.far_mass_h[:, None]


def usage_profile(sums: DistanceSums) -> Tensor:
    """Share [h, m] of every frequency pair in the positive parts, weighted by α."""
    return sums.positive_hm / sums.positive_hm.sum(1, keepdim=True)


def mean_distance(sums: DistanceSums) -> Tensor:
    """Mean distance [h] of attention to earlier tokens, in tokens."""
    earlier_ht = sums.attention_ht[:, 1:]
    distance_t = torch.arange(1, sums.attention_ht.shape[1], dtype=torch.float64, device=earlier_ht.device)
    return earlier_ht @ distance_t / earlier_ht.sum(1)


def share_beyond(sums: DistanceSums, distance: float) -> Tensor:
    """Share [h] of the attention to earlier tokens that goes further back than `distance`."""
    earlier_ht = sums.attention_ht[:, 1:]
    return earlier_ht[:, int(distance) :].sum(1) / earlier_ht.sum(1)


def offset_mass(sums: DistanceSums, offset: int) -> Tensor:
    """Mean attention weight [h] of a query on the token `offset` places before it."""
    return sums.attention_ht[:, offset] / sums.queries_t[offset]


@dataclass(frozen=True, eq=False)
class Null:
    """What chance gives one layer: mean and standard deviation of a score over reassigned distances, fp64 [h]."""

    mean_h: Tensor
    sd_h: Tensor

    def z(self, score_h: Tensor) -> Tensor:
        """Distance of a score from the null mean in null standard deviations; nan where they are 0."""
        return torch.where(self.sd_h > 0, (score_h - self.mean_h) / self.sd_h, torch.nan)


def permutation_null(sums: DistanceSums, score: Score, count: int, seed: int) -> Null:
    """The score under `count` random reassignments of the distances that occur (1 … length-1)."""
    generator = torch.Generator().manual_seed(seed)
    last = int(sums.queries_t.nonzero().max())
    found = []
    for _ in range(count):
        order_t = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(last, generator=generator)])
        label_t = sums.label_t.clone()
        label_t[: last + 1] = sums.label_t[order_t.to(label_t.device)]
        found.append(score(replace(sums, label_t=label_t)))
    drawn_nh = torch.stack(found)
    return Null(drawn_nh.mean(0), drawn_nh.std(0))
