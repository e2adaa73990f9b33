"""Linear output head: logits = W h, with W of its own or the token embedding's (tied; Press and Wolf 2017).

Shapes: b batch · t tokens · d width · v vocabulary. Losses that never hold all logits use `weight_vd` directly.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.recipe.part import Part


class LinearHead(nn.Module):
    """Maps hidden states to logits.

    A tied head owns no parameter: it looks the weight up in the embedding, so that state dicts hold it once.
    """

    def __init__(self, width: int, embedding: nn.Embedding, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self._embedding = (embedding,)  # in a tuple, so that it is no submodule
        if not tied:
            self.project = nn.Linear(width, embedding.num_embeddings, bias=False)

    @property
    def weight_vd(self) -> Tensor:
        """The output matrix [v, d]."""
        return self._embedding[0].weight if self.tied else self.project.weight

    def logits(self, hidden_btd: Tensor) -> Tensor:
        """[…, d] → […, v]."""
        return F.linear(hidden_btd, self.weight_vd)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        """The same as `logits`."""
        return self.logits(hidden_btd)

    def flops(self) -> float:
        """Forward FLOPs per token."""
        return 2 * self.weight_vd.numel()


class LinearHeadConfig(Part):
    """`head: linear`."""

    family: ClassVar[str] = "head"
    kind: Literal["linear"] = "linear"
    tied: bool = Field(default=True, description="true: the output matrix is the token embedding")

    def build(self, context: BuildContext, embedding: nn.Embedding) -> LinearHead:
        """The head; a tied one reads the embedding's weight."""
        return LinearHead(context.width, embedding, self.tied)
