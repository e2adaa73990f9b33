"""What every position part offers to attention."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from torchstone.nn.span import Span


class Position(nn.Module, ABC):
    """Base of position modules: tells queries and keys where they stand.

    Shapes: b batch · t tokens · h query heads · g key heads · d head channels.
    """

    @abstractmethod
    def arrange(self, weight: Tensor) -> Tensor:
        """A query or key weight [heads·d, …], or a gain [d], with channels in the order that `rotate` works in.

        Reordering the channels of queries and keys alike leaves their products unchanged; reordering the weights
        is cheap, reordering activations is not.
        """

    @abstractmethod
    def rotate(self, q_bthd: Tensor, k_btgd: Tensor, span: Span, offset: int) -> tuple[Tensor, Tensor]:
        """Arranged queries and keys that carry their positions: the span's, or offset, offset+1, … where it has none."""
