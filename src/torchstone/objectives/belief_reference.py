"""The belief-state loss as it is written down: one pair at a time. For tests and benchmarks; slow.

Shapes: t tokens · d width · v vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.models.belief_state import BeliefState
from torchstone.objectives.belief_pairs import PairRule


def row_pairs(tokens: list[int], end_token: int, rule: PairRule) -> list[tuple[int, int]]:
    """All pairs (i, j) of a row by the words of the rule, before sampling."""
    pairs = []
    for i in range(rule.context_length, len(tokens)):
        for j in range(i + rule.gap_min, len(tokens)):
            border = end_token in tokens[i + 1 : j]
            if not border and (rule.gap_max is None or j - i < rule.gap_max):
                pairs.append((i, j))
    return pairs


def pair_targets(tokens: list[int], pair: tuple[int, int], end_token: int, rule: PairRule) -> tuple[int, int]:
    """Next and previous token of a pair."""
    i, j = pair
    if j - i == 1 and rule.single_gap == "eos":
        return end_token, end_token
    return tokens[i + 1], tokens[j - 1]


def pair_losses(model: BeliefState, tokens_bt: Tensor, rule: PairRule) -> list[Tensor]:
    """For each row the losses of its pairs, mean of both sides, in a double loop that runs the head once a pair."""
    prefix_btd, suffix_btd = model(tokens_bt).hidden_btd, model.suffixes(tokens_bt).hidden_btd
    rows = []
    for row, tokens in enumerate(tokens_bt.tolist()):
        losses = []
        for i, j in row_pairs(tokens, model.end_token, rule):
            targets = pair_targets(tokens, (i, j), model.end_token, rule)
            logits = model.head.pair_logits(prefix_btd[row, i], suffix_btd[row, j])
            both = (
                F.cross_entropy(side, side.new_tensor(target).long())
                for side, target in zip(logits, targets, strict=True)
            )
            losses.append(torch.stack(list(both)).mean())
        if losses:
            rows.append(torch.stack(losses))
    return rows


def naive_loss(model: BeliefState, tokens_bt: Tensor, rule: PairRule) -> Tensor:
    """The objective's loss: mean over pairs, then over rows that have any."""
    return torch.stack([losses.mean() for losses in pair_losses(model, tokens_bt, rule)]).mean()


def equally_batched_loss(model: BeliefState, tokens_bt: Tensor, rule: PairRule, pairs: int) -> Tensor:
    """The published code's mean of means over batches of `pairs` pairs, in which a short last batch counts too much."""
    means = [
        torch.stack([part.mean() for part in losses.split(pairs)]).mean()
        for losses in pair_losses(model, tokens_bt, rule)
    ]
    return torch.stack(means).mean()
