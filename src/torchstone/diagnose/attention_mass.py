"""Where attention goes: the share on the tokens that hold the answer, and the share wasted on all others.

For a query with known answer positions S and weights a (what multiplies the values; signed for differential attention):

    answer mass   Σ_{s in S} a_s / Σ_s |a_s|          raw: Σ_{s in S} a_s
    noise mass    Σ_{s not in S} |a_s| / Σ_s |a_s|

Dividing by Σ|a| makes softmax maps (Σ|a| = 1) and differences of maps comparable. With signed weights the two need not sum
to 1. A head that retrieves is one of many, so masses are given for the best head (most answer mass on one half of the
queries, measured on the other) as well as for the mean of the heads.

Also here: the entropy of |a|/Σ|a| in nats, and the largest |score| before the softmax, which outliers drive.

Shapes: b sequences · h heads · t queries · s keys · n scored queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.errors import DataError
from torchstone.nn.attention.observe import observe


@dataclass(frozen=True)
class AttentionMass:
    """Masses of one attention layer.

    Attributes:
        answer, answer_raw, noise, entropy: of the best head.
        answer_mean, noise_mean: over all heads.
        largest_score: largest |score| before the softmax, over all queries.
    """

    answer: float
    answer_raw: float
    noise: float
    entropy: float
    answer_mean: float
    noise_mean: float
    largest_score: float


@torch.no_grad()
def attention_mass(
    model: Any, batches: Iterable[Batch], answers_of: Callable[[Tensor], Tensor], layer: int = -1
) -> AttentionMass:
    """Masses at the scored positions of held-out batches.

    Args:
        model: a decoder with observable attention.
        batches: batches of a task whose targets are IGNORE except where an answer is asked for.
        answers_of: tokens [b, t] → bool [b, t, s], True where key s holds the answer to query t.
        layer: which attention layer, in order; -1 is the last.

    Raises:
        DataError: fewer than two queries are scored.
    """
    weights, answers, largest = [], [], 0.0
    for batch in batches:
        with observe(model) as record:
            model(batch.tokens_bt)
        seen = list(record.values())[layer]
        assert seen.weights is not None and seen.scores is not None
        valid_bt = batch.targets_bt != IGNORE
        weights.append(seen.weights.transpose(1, 2)[valid_bt].double())
        answers.append(answers_of(batch.tokens_bt)[valid_bt])
        causal_ts = torch.ones(seen.scores.shape[-2:], dtype=torch.bool).tril()
        largest = max(largest, float(seen.scores.abs().masked_fill(~causal_ts, 0).max()))
    weights_nhs, answers_n1s = torch.cat(weights), torch.cat(answers).unsqueeze(1)
    if weights_nhs.shape[0] < 2:
        raise DataError("attention mass needs at least two scored queries; give more held-out sequences.")
    return _masses(weights_nhs, answers_n1s, largest)


def _masses(weights_nhs: Tensor, answers_n1s: Tensor, largest: float) -> AttentionMass:
    total_nh = weights_nhs.abs().sum(-1)
    raw_nh = (weights_nhs * answers_n1s).sum(-1)
    answer_nh = raw_nh / total_nh
    share_nhs = weights_nhs.abs() / total_nh.unsqueeze(-1)
    noise_nh = (share_nhs * ~answers_n1s).sum(-1)
    entropy_nh = torch.special.entr(share_nhs).sum(-1)
    half = weights_nhs.shape[0] // 2
    best = int(answer_nh[:half].mean(0).argmax())
    return AttentionMass(
        answer=float(answer_nh[half:, best].mean()),
        answer_raw=float(raw_nh[half:, best].mean()),
        noise=float(noise_nh[half:, best].mean()),
        entropy=float(entropy_nh[half:, best].mean()),
        answer_mean=float(answer_nh.mean()),
        noise_mean=float(noise_nh.mean()),
        largest_score=largest,
    )
