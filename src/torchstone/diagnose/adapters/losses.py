"""Losses of every token without the logits of all tokens at once.

Shapes: b batch · t tokens · w width · v vocabulary · n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.errors import ConfigError

CHUNK_LOGITS = 1 << 24  # 64 MB in fp32


def targets_of(tokens_bt: Tensor, last: int | None) -> Tensor:
    """The tokens to predict: all but the first, or the `last` of those.

    Raises:
        ConfigError: fewer than two tokens, or `last` outside 1 … t-1.
    """
    possible = tokens_bt.shape[1] - 1
    if possible < 1:
        raise ConfigError(f"rows have {tokens_bt.shape[1]} token(s); a loss needs at least 2.")
    if last is not None and not 1 <= last <= possible:
        raise ConfigError(
            f"losses of the last {last} tokens were asked for; rows of {possible + 1} have 1 to {possible}."
        )
    return tokens_bt[:, -(possible if last is None else last) :]


@torch.no_grad()
def losses_of(hidden_btw: Tensor, targets_bt: Tensor, logits: Callable[[Tensor], Tensor], vocab_size: int) -> Tensor:
    """-log p of the targets, fp32 [b, t].

    Args:
        hidden_btw: final hidden states, whose last but one is the first to predict from the end.
        targets_bt: from `targets_of`.
        logits: the head, [1, n, w] → [1, n, v].
        vocab_size: rows of the head, for the size of a chunk.
    """
    states_nw = hidden_btw[:, -targets_bt.shape[1] - 1 : -1].flatten(0, 1)
    size = max(1, CHUNK_LOGITS // vocab_size)
    pairs = zip(states_nw.split(size), targets_bt.flatten().split(size), strict=True)
    losses = [F.cross_entropy(logits(x_nw[None])[0].float(), y_n, reduction="none") for x_nw, y_n in pairs]
    return torch.cat(losses).view(targets_bt.shape)
