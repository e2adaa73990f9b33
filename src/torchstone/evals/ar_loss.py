"""Held-out loss on AR-hits and on the other tokens (Arora et al., arXiv 2312.04927).

An AR-hit repeats a pair of tokens that the context already holds; a model with good in-context retrieval predicts it. The
split shows whether an architecture gains by looking things up or by knowing more. See `torchstone.data.ngrams`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchstone.data.batch import IGNORE
from torchstone.data.ngrams import ar_hits
from torchstone.errors import DataError


@torch.no_grad()
def ar_losses(model: Any, objective: nn.Module, data: Any, sequences: int, size: int = 32) -> dict[str, float]:
    """`ar_hit_loss` and `other_loss` in nats per token, and `ar_hit_share` of the targets.

    Args:
        model: a decoder in evaluation mode.
        objective: gives the loss of each token.
        data: a data source of text.
        sequences: held-out sequences.
        size: sequences per forward pass.

    Raises:
        DataError: the held-out text has no AR-hit, or nothing else.
    """
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for batch in data.evaluation(size, sequences):
        losses_bt = objective(model, batch).per_token_bt.double()
        hits_bt = ar_hits(batch)
        others_bt = (batch.targets_bt != IGNORE) & ~hits_bt
        for index, mask_bt in enumerate((hits_bt, others_bt)):
            sums[index] += losses_bt[mask_bt].sum()
            counts[index] += mask_bt.sum()
    if not bool(counts.all()):
        raise DataError("the held-out text has no AR-hits, or only AR-hits; evaluate more sequences.")
    hit, other = (sums / counts).tolist()
    return {"ar_hit_loss": hit, "other_loss": other, "ar_hit_share": float(counts[0] / counts.sum())}
