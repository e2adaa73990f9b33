"""Losses of every token without the logits of all tokens at once, and where one that is not finite comes from.

Shapes: b batch · t tokens · w width · v vocabulary · n tokens of a chunk · l losses of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError

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
        hidden_btw: final hidden states of all tokens but the last, which predicts nothing here.
        targets_bt: from `targets_of`.
        logits: the head, [1, n, w] → [1, n, v].
        vocab_size: rows of the head, for the size of a chunk.
    """
    states_nw = hidden_btw[:, -targets_bt.shape[1] :].flatten(0, 1)
    size = max(1, CHUNK_LOGITS // vocab_size)
    pairs = zip(states_nw.split(size), targets_bt.flatten().split(size), strict=True)
    losses = [F.cross_entropy(logits(x_nw[None])[0].float(), y_n, reduction="none") for x_nw, y_n in pairs]
    return torch.cat(losses).view(targets_bt.shape)


def finite_losses(subject: Subject, losses_bl: Tensor, tokens_bt: Tensor) -> Tensor:
    """The losses of the last l tokens of rows, as they are; the model runs once more only where one is not finite.

    Raises:
        DataError: a loss is NaN or infinite; names the earliest such token, its row in this batch, and the first state that is
            not finite with its place, which may be a later token: a weight of 0 does not keep a NaN out of earlier ones.
    """
    bad_bl = ~losses_bl.isfinite()
    if not bool(bad_bl.any()):
        return losses_bl
    row, at = _earliest(bad_bl)
    token = tokens_bt.shape[1] - losses_bl.shape[1] + at
    first = first_not_finite(subject.hidden_states(tokens_bt[:, :-1]))
    raise DataError(
        f"{subject.name} has a loss of {float(losses_bl[row, at])} at token {token} of row {row} of the batch (counted from 0); "
        f"what is not finite first is {first}. Load the model in float32, or look "
        "for damaged weights there."
    )


def first_not_finite(states: Sequence[Tensor]) -> str:
    """In words, the first of the states that `Subject.hidden_states` gives that is not finite; else the head after them."""
    for name, state_btw in zip(state_names(len(states)), states, strict=True):
        bad_bt = ~state_btw.isfinite().all(-1)
        if bool(bad_bt.any()):
            row, token = _earliest(bad_bt)
            return f"the state after {name} (token {token} of row {row})"
    return "the output of the output head"


def _earliest(bad_bt: Tensor) -> tuple[int, int]:
    """Row and token of the place that is set and has the smallest token number."""
    row, token = min(bad_bt.nonzero().tolist(), key=lambda place: place[1])
    return row, token


def state_names(count: int) -> list[str]:
    """Names of what `Subject.hidden_states` returns."""
    return ["embedding", *(f"block {index}" for index in range(count - 2)), "final norm"]
