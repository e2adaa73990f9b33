"""Fill in the middle: next-token loss on what follows a <fim> token (the baseline of Hu et al., arXiv 2410.23506).

A row is made of documents [suffix, <fim>, prefix … middle, END] (`torchstone.data.fill_in_the_middle`). The model reads the
suffix and is scored on what comes after <fim>, up to and including the end token. Nothing before <fim> is scored, nor is the
first end token of a packed row where no <fim> stands before it: what it ends began in another row.

    targets    .  3  4  F  5  6  7  E  4  4  F  3  E  5
    scored     0  0  0  0  1  1  1  1  0  0  0  1  1  0          F = <fim>, E = end

Shapes: b rows · t tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.objectives.next_token import LossOutput, NextToken
from torchstone.recipe.part import Part


def middle_mask(targets_bt: Tensor, fim_token: int, end_token: int) -> Tensor:
    """bool [b, t]: targets after a <fim>, up to and including the next end token.

    Only what the row itself shows counts: targets before its first <fim> are not scored.
    """
    index_t = torch.arange(targets_bt.shape[1], device=targets_bt.device)
    fim_bt = _latest(targets_bt == fim_token, index_t)
    # the end token of a document still belongs to it, so ends are counted up to the target before
    end_bt = torch.full_like(fim_bt, -1)
    end_bt[:, 1:] = _latest(targets_bt == end_token, index_t)[:, :-1]
    return (fim_bt > end_bt) & (targets_bt != fim_token)


def _latest(marks_bt: Tensor, index_t: Tensor) -> Tensor:
    """Index of the latest mark up to each token; -1 before the first."""
    return torch.where(marks_bt, index_t, -1).cummax(1).values


class FillInTheMiddle(NextToken):
    """The objective: mean cross-entropy over the tokens of the middle.

    Args:
        fim_token, end_token: ids of <fim> and of the end of a document.
        chunk: see `NextToken`.
    """

    def __init__(self, fim_token: int, end_token: int, chunk: int | None = None) -> None:
        super().__init__(chunk)
        self.fim_token, self.end_token = fim_token, end_token

    def masked(self, batch: Batch) -> Batch:
        """The batch with targets of the middle only."""
        targets_bt = batch.targets_bt
        mask_bt = middle_mask(targets_bt, self.fim_token, self.end_token)
        return dataclasses.replace(batch, targets_bt=targets_bt.masked_fill(~mask_bt, IGNORE))

    def count_targets(self, batch: Batch, model: Any) -> int:
        """Targets of the middle."""
        return int((self.masked(batch).targets_bt != IGNORE).sum())

    def forward(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of `model` (a decoder) on a batch."""
        return super().forward(model, self.masked(batch))


class FillInTheMiddleObjectiveConfig(Part):
    """`objective: fill-in-the-middle`: predict the tokens after <fim>, cross-entropy in nats."""

    family: ClassVar[str] = "objective"
    kind: Literal["fill-in-the-middle"] = "fill-in-the-middle"
    fim_token: int = Field(
        ge=0, description="id of <fim>: vocab_size of the text's tokenizer in fill-in-the-middle data"
    )
    end_token: int = Field(ge=0, description="id that ends a document: 256 for bytes, vocab_size - 1 for bpe")
    chunk: int | None = Field(
        default=None, gt=0, description="tokens whose logits exist at once; null: about a million logits"
    )

    def build(self) -> FillInTheMiddle:
        """The objective."""
        return FillInTheMiddle(self.fim_token, self.end_token, self.chunk)
