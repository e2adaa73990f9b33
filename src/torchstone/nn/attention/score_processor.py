"""What every score processor offers: it reads the scores (and the position bias) of a query and puts others in place.

Attention with a processor is softmax(processor(scores, bias)) · v (`nn.attention.processed`). A processor may mix maps
with each other and the keys of one query with each other; it never mixes queries, so that rows can be computed one
after another, exactly.

Shapes: b batch, or 1 where all rows agree · u query sub-heads, one map each · t queries · s keys, in order of their
index · e value channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from torchstone.nn.roles import Roles


class ScoreProcessor(nn.Module, ABC):
    """Base of score processors.

    Attributes:
        reach: keys to either side that one processed score reads; above 0 the keys must come in order.
        reads_ahead: whether a score depends on how many keys follow that its query may not see.
    """

    reach: int = 0
    reads_ahead: bool = False

    @abstractmethod
    def forward(self, scores_buts: Tensor, bias_buts: Tensor | None, visible_b1ts: Tensor | None) -> Tensor:
        """Processed scores [b, u, t, s] in fp32 or finer, bias included, before the softmax's mask.

        Args:
            scores_buts: scaled scores in fp32 or finer.
            bias_buts: the position's bias, of a shape that broadcasts to the scores'; None where it has none.
            visible_b1ts: bool, what each query may see; None where it may see all.
        """

    @abstractmethod
    def flops(self, length: int) -> float:
        """Forward FLOPs per query token over `length` keys, all maps in full."""

    def parameter_roles(self) -> Roles:
        """Matrices of a processor are neither queries' and keys' nor values' and outputs'."""
        return {name: "other" for name, parameter in self.named_parameters() if parameter.dim() >= 2}

    @abstractmethod
    def kept_values(self, length: int) -> int:
        """fp32 values that a training step keeps per query token, maps and scores included, by `blocked` if there is one."""

    def kept_at_once(self, length: int) -> int:
        """The same where `blocked` cannot help: all maps exist at once, and every operation keeps what it reads."""
        return self.kept_values(length)

    def block_rows(self, device: torch.device) -> int | None:
        """Queries that `blocked` computes at a time, at most; None where it has no operator on this device."""
        return None

    def blocked(
        self,
        q_butd: Tensor,
        k_busd: Tensor,
        v_buse: Tensor,
        bias_buts: Tensor | None,
        allowed_b1ts: Tensor | None,
        scale: float,
    ) -> Tensor | None:
        """Outputs [b, u, t, e] by an operator of the processor's own; None where it has none for these tensors.

        The queries are the last t of the s tokens, and none sees a later key (`allowed_b1ts` may hide more).
        """
        return None
