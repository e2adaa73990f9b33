"""Which tokens a decay helps: the change of each token's loss against its entropy, in groups of equal mass.

In the river valley picture (Wen et al. 2024, arXiv 2410.05192) a plateau and a decay lower the losses of different tokens.
Whether that is so, and which tokens are which, is a measurement:

    split = entropy_split(before_n, after_n, entropy_n)          # losses of the same tokens just before and after a decay
    split.change                                                 # mean change of the loss, lowest entropy first
    split.drop_top, split.drop_bottom

The reference entropy is the true one where the data's maker knows it (`data: mixed-bigram`), otherwise that of a better model's
next-token distribution at the same position.

Groups have equal mass exactly: a token on a border is divided. Tokens of equal entropy are alike, so that each of them counts
with the mean change of all of them, whatever their order.

Pitfall: use an entropy that neither of the two losses made; a model's own entropy is low where its own loss is low.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.errors import ConfigError, DataError


@dataclass(frozen=True)
class EntropySplit:
    """Groups of tokens from the lowest entropy to the highest.

    Attributes:
        entropy: mean reference entropy of each group, nats.
        change: mean of loss after − loss before; negative where the decay helped.
    """

    entropy: tuple[float, ...]
    change: tuple[float, ...]

    @property
    def drop_top(self) -> float:
        """How much the loss fell in the group of highest entropy."""
        return -self.change[-1]

    @property
    def drop_bottom(self) -> float:
        """How much the loss fell in the group of lowest entropy."""
        return -self.change[0]


def entropy_split(
    before_n: Tensor, after_n: Tensor, entropy_n: Tensor, weights_n: Tensor | None = None, groups: int = 10
) -> EntropySplit:
    """Mean change of the loss by reference entropy.

    Args:
        before_n, after_n: loss of every token, in one order.
        entropy_n: reference entropy of every token.
        weights_n: mass of every token (an exact table's frequencies); None: equal.
        groups: how many of equal mass.

    Raises:
        ConfigError: `groups` is below 1. DataError: lengths differ, there are fewer tokens than groups where all weigh the
            same, or numbers are not finite.
    """
    if groups < 1:
        raise ConfigError(f"groups was given as {groups}; there is at least 1 group of tokens.")
    equal = weights_n is None
    weights_n = torch.ones_like(entropy_n) if weights_n is None else weights_n
    given = [values.detach().double().cpu().flatten() for values in (before_n, after_n, entropy_n, weights_n)]
    if len({len(values) for values in given}) > 1:
        raise DataError(
            f"losses, entropies and weights belong to the same tokens; given {', '.join(str(len(values)) for values in given)}."
        )
    if (
        not all(bool(values.isfinite().all()) for values in given)
        or bool((given[3] < 0).any())
        or not float(given[3].sum())
    ):
        raise DataError("losses, entropies and weights must be finite numbers, and weights positive; check the losses.")
    before, after, entropy, weights = given
    if equal and len(entropy) < groups:
        raise DataError(
            f"{len(entropy)} tokens make no {groups} groups; give longer or more texts, or ask for at most {len(entropy)} groups."
        )
    order = entropy.argsort(stable=True)
    entropy, weights, change = (
        entropy[order],
        weights[order],
        _tied((after - before)[order], entropy[order], weights[order]),
    )
    share_gn = _shares(weights / weights.sum(), groups)
    return EntropySplit(tuple((share_gn @ entropy).tolist()), tuple((share_gn @ change).tolist()))


def _tied(change_n: Tensor, entropy_n: Tensor, weights_n: Tensor) -> Tensor:
    """Each token's change replaced by the mean over tokens of its very entropy."""
    _, group_n = entropy_n.unique_consecutive(return_inverse=True)
    zeros = torch.zeros(int(group_n[-1]) + 1, dtype=torch.float64)
    mass = zeros.index_add(0, group_n, weights_n)
    total = zeros.index_add(0, group_n, weights_n * change_n)
    return (total / mass.clamp(min=torch.finfo(torch.float64).tiny))[group_n]


def _shares(weights_n: Tensor, groups: int) -> Tensor:
    """[g, n]: the part of every group's mass that each token makes up; rows sum to 1."""
    ends_n = weights_n.cumsum(0)
    starts_n = ends_n - weights_n
    low_g = torch.arange(groups, dtype=torch.float64)[:, None] / groups
    overlap_gn = (torch.minimum(ends_n, low_g + 1 / groups) - torch.maximum(starts_n, low_g)).clamp(min=0)
    share_gn: Tensor = overlap_gn / overlap_gn.sum(1, keepdim=True)
    return share_gn
