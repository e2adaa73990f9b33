"""AR-hits: targets that repeat a pair of tokens which the context already holds.

A target is an AR-hit (associative-recall hit; Arora et al., arXiv:2312.04927) when the pair (token before it,
target) occurred earlier in the same sequence. A model that looks up its context can predict it; the others
need what is in the weights. Loss on the two groups separates both abilities.

Shapes: b sequences · t tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch


def ar_hits(batch: Batch) -> Tensor:
    """bool [b, t]: True where (tokens[t], targets[t]) stands at (tokens[s], tokens[s+1]) for some s < t.

    Where the batch has documents, both pairs lie in one document. Ignored targets are no hits.
    """
    tokens_bt, targets_bt = batch.tokens_bt, batch.targets_bt
    size, length = tokens_bt.shape
    documents_bt = torch.zeros_like(tokens_bt) if batch.documents_bt is None else batch.documents_bt
    group_bt = torch.arange(size, device=tokens_bt.device)[:, None] * (documents_bt.max() + 1) + documents_bt
    scored_bt = targets_bt != IGNORE
    vocabulary = int(torch.maximum(tokens_bt.max(), targets_bt.max())) + 1
    first_bt = group_bt * vocabulary + tokens_bt
    asked_bt = first_bt * vocabulary + targets_bt.clamp_min(0)
    seen_bs = first_bt[:, :-1] * vocabulary + tokens_bt[:, 1:]
    inside_bs = documents_bt[:, :-1] == documents_bt[:, 1:]

    codes = torch.cat([seen_bs.reshape(-1), asked_bt.reshape(-1)])
    _, number = codes.unique(return_inverse=True)
    seen, asked_bt = number[: seen_bs.numel()], number[seen_bs.numel() :].view(size, length)
    steps_s = torch.arange(length - 1, device=tokens_bt.device).expand(size, -1)
    steps_s = torch.where(inside_bs, steps_s, length).reshape(-1)
    earliest = torch.full((int(number.max()) + 1,), length, device=tokens_bt.device)
    earliest.scatter_reduce_(0, seen, steps_s, "amin")
    steps_t = torch.arange(length, device=tokens_bt.device)
    return scored_bt & (earliest[asked_bt] < steps_t)
