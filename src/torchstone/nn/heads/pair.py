"""Pair head: next token of a prefix and previous token of a suffix, from one vector of each (Hu et al., arXiv 2410.23506).

    c = [f; b],   c' = RMSNorm(c + W_down( silu(W_gate c) ⊙ W_up c ))  = [c_next; c_prev]
    logits_next = U c_next,   logits_prev = U c_prev

U is one output matrix of its own. W_gate and W_up are linear, so W c = W_f f + W_b b: the halves are computed once per token
(`tables`), and a pair costs an addition where a product would stand. With T tokens and T² pairs that saves two thirds of the
hidden layer.

As the head of a decoder (`features`, `logits`) it pairs hidden states with the suffix that holds nothing but the end of the
document, so that a belief-state model decodes and trains like any other model.

Shapes: n pairs · d width · h hidden · v vocabulary · … any leading sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from torchstone.nn.heads.base import Features, Head
from torchstone.nn.norm.rmsnorm import RMSNorm
from torchstone.nn.roles import Roles
from torchstone.recipe.schema import Section

MULTIPLE = 128  # what the hidden width is rounded to


class PairHeadConfig(Section):
    """Settings of the pair head."""

    hidden: int | None = Field(
        default=None, gt=0, description="hidden width; null: 16/3 of the model's width, rounded to a multiple of 128"
    )
    eps: float = Field(default=1e-5, gt=0, description="added to the mean square of the head's norm")

    def width_of(self, width: int) -> int:
        """The hidden width in a model of this width; at least 128."""
        return self.hidden or max(MULTIPLE, MULTIPLE * round(16 * width / 3 / MULTIPLE))


class PairHead(Head):
    """Maps (prefix state, suffix state) to two feature vectors, and those to logits.

    Args:
        width: channels of either state.
        hidden: channels between the two layers.
        vocab_size: token ids.
        eps: of the norm.
        empty_suffix: gives the state [width] of the empty suffix, with its gradient.
    """

    tied = False

    def __init__(
        self, width: int, hidden: int, vocab_size: int, eps: float, empty_suffix: Callable[[], Tensor]
    ) -> None:
        super().__init__()
        self.width = width
        self.w_gate = nn.Linear(2 * width, hidden, bias=False)
        self.w_up = nn.Linear(2 * width, hidden, bias=False)
        self.w_down = nn.Linear(hidden, 2 * width, bias=False)
        self.norm = RMSNorm(2 * width, eps)
        self.project = nn.Linear(width, vocab_size, bias=False)
        self._empty_suffix = (empty_suffix,)  # in a tuple, so that the model is no submodule

    @property
    def weight_vd(self) -> Tensor:
        """U, the output matrix [v, d]."""
        return self.project.weight

    def tables(self, prefix: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
        """Shares […, 2h] of prefixes […, d] and of suffixes […, d] in [W_gate c; W_up c]."""
        weight_hc = torch.cat([self.w_gate.weight, self.w_up.weight])
        return F.linear(prefix, weight_hc[:, : self.width]), F.linear(suffix, weight_hc[:, self.width :])

    def pair(self, prefix: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
        """c_next and c_prev […, d] of pairs of states […, d]; leading sizes are broadcast."""
        prefix, suffix = torch.broadcast_tensors(prefix, suffix)
        both = torch.cat([prefix, suffix], dim=-1)
        out = self.norm(both + self.w_down(F.silu(self.w_gate(both)) * self.w_up(both)))
        return out[..., : self.width], out[..., self.width :]

    def pair_logits(self, prefix: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
        """Logits […, v] of the next token of the prefix and of the previous token of the suffix."""
        following, preceding = self.pair(prefix, suffix)
        return self.project(following), self.project(preceding)

    def features(self, hidden: Tensor) -> Features:
        """c_next of prefix states […, d] and the empty suffix."""
        return Features(self.pair(hidden, self._empty_suffix[0]())[0])

    def flops(self) -> float:
        """Forward FLOPs of one pair when its halves are not shared with other pairs, one of the two logits taken."""
        return sum(2.0 * layer.weight.numel() for layer in (self.w_gate, self.w_up, self.w_down, self.project))

    def table_flops(self) -> float:
        """Forward FLOPs per token of one of the two tables."""
        return float(self.w_gate.weight.numel() + self.w_up.weight.numel())

    def pair_flops(self, sides: int = 2) -> float:
        """Forward FLOPs of a pair whose tables are there, with logits on one side or both."""
        return 2.0 * self.w_down.weight.numel() + 2.0 * sides * self.project.weight.numel()

    def parameter_roles(self) -> Roles:
        """The output matrix counts with the embeddings, the rest is a feed-forward layer."""
        return {"project.weight": "embeddings", "w_gate.weight": "mlp", "w_up.weight": "mlp", "w_down.weight": "mlp"}
