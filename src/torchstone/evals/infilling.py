"""Infilling: how likely is the true middle of a held-out text, given what is before it and what is behind it?

    belief-state model    ln p of each token of the middle, and of "the goal begins here", under the pair (f_{t−1}, b of the goal)
    decoder with <fim>    the same tokens in the row goal <fim> prefix middle END

Both are asked for the same tokens and know the same text. `plain_losses` is the loss of the whole text without a goal: the
empty suffix for a belief-state model, ordinary next tokens for a decoder.

Shapes: b texts · t tokens · d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchstone.data.fill_in_the_middle import FillInTheMiddleSource
from torchstone.errors import DataError
from torchstone.models.belief_generate import suffix_vectors
from torchstone.models.belief_state import BeliefState


class Gap(NamedTuple):
    """One held-out text in three parts, without end tokens."""

    prefix: list[int]
    middle: list[int]
    goal: list[int]


def held_out_gaps(source: FillInTheMiddleSource, count: int, middle: int) -> list[Gap]:
    """Whole held-out pieces, evenly spread: the goal is as long as goal_max, the middle has `middle` tokens.

    Raises:
        DataError: there are fewer whole pieces, or they are too short.
    """
    pieces, task = source.held_out, source.settings
    whole = np.flatnonzero(pieces.size_p == task.piece)
    first = task.piece - task.goal_max - middle
    if count > len(whole) or first < 1:
        raise DataError(
            f"the held-out text has {len(whole)} pieces of {task.piece} tokens, and {count} with a middle of {middle} and a goal "
            f"of {task.goal_max} are asked for; ask for fewer or shorter ones, or raise text.validation_fraction."
        )
    chosen = whole[np.arange(count) * len(whole) // count]
    texts = [pieces.text(int(piece)).tolist() for piece in chosen]
    return [Gap(text[:first], text[first : first + middle], text[first + middle :]) for text in texts]


@torch.no_grad()
def infilling_losses(model: Any, gaps: Sequence[Gap], fim_token: int, end_token: int, batch: int = 32) -> list[float]:
    """Mean loss of each middle and the end token behind it, in nats per token.

    Args:
        model: a belief-state model, or a decoder trained on rows with `fim_token`.
        gaps: of equal sizes.
        fim_token, end_token: ids of the data.
        batch: texts at once.
    """
    found: list[float] = []
    device = model.embed.weight.device
    for start in range(0, len(gaps), batch):
        part = gaps[start : start + batch]
        targets_bt = torch.tensor([[*gap.middle, end_token] for gap in part], device=device)
        if isinstance(model, BeliefState):
            rows = [[end_token, *gap.prefix, *gap.middle] for gap in part]
            suffix_b1d = suffix_vectors(model, [[*gap.goal, end_token] for gap in part])[:, None]
            hidden_btd = model(torch.tensor(rows, device=device)).hidden_btd[:, -targets_bt.shape[1] :]
            logits_btv = model.head.pair_logits(hidden_btd, suffix_b1d)[0]
        else:
            rows = [[*gap.goal, fim_token, *gap.prefix, *gap.middle] for gap in part]
            hidden_btd = model(torch.tensor(rows, device=device)).hidden_btd[:, -targets_bt.shape[1] :]
            logits_btv = model.logits(hidden_btd)
        found += _means(logits_btv, targets_bt)
    return found


@torch.no_grad()
def plain_losses(model: Any, gaps: Sequence[Gap], batch: int = 32) -> list[float]:
    """Mean loss of the whole text of each gap, its first token not counted, in nats per token."""
    found: list[float] = []
    for start in range(0, len(gaps), batch):
        rows = [[*gap.prefix, *gap.middle, *gap.goal] for gap in gaps[start : start + batch]]
        tokens_bt = torch.tensor(rows, device=model.embed.weight.device)
        found += _means(model.logits(model(tokens_bt[:, :-1]).hidden_btd), tokens_bt[:, 1:])
    return found


def _means(logits_btv: Tensor, targets_bt: Tensor) -> list[float]:
    log_p_btv = logits_btv.float().log_softmax(-1)
    means: list[float] = (-log_p_btv.gather(-1, targets_bt.unsqueeze(-1)).squeeze(-1).mean(1)).tolist()
    return means
