"""What every position part offers to attention: turned queries and keys, a bias on the scores, or neither.

    scores = scale · q kᵀ + bias

Shapes: b batch · t queries · s keys · h heads · g key heads · d head channels.

A bias has one channel per head. Both maps of a head in differential attention share it, because a position belongs to
the head, not to the map.

Pitfall: distances are by index in the sequence, because a query sees only keys of its own document, where indices and
positions differ by the same number. What depends on the place of the query itself (FIRE's denominator) goes by
position, which starts again in every document and does not count left padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from torchstone.nn.roles import Roles
from torchstone.nn.span import Span

ScoreTerm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (batch, head, query index, key index) → bias


@dataclass(frozen=True)
class PositionContext:
    """What a position part may know of the attention around it when it is built.

    Attributes:
        head_dim: channels of one query-key (sub-)head.
        heads: heads that have a bias of their own; in differential attention differential heads, not maps.
        length: sequence length of training, in tokens.
        processed: a score processor reads the bias.
    """

    head_dim: int
    heads: int
    length: int
    processed: bool = False


class Offsets(NamedTuple):
    """Where queries and keys of one attention call stand.

    Attributes:
        distance_ts: int64, index of the query minus index of the key; negative for later keys.
        position: int64 [t], or [b, t] for given positions: the position of each query.
    """

    distance_ts: Tensor
    position: Tensor


class Position(nn.Module, ABC):
    """Base of position modules: tells queries and keys where they stand.

    Attributes:
        biased: whether `bias` returns a tensor.
    """

    biased: ClassVar[bool] = False

    @abstractmethod
    def arrange(self, weight: Tensor) -> Tensor:
        """A query or key weight [heads·d, …], or a gain [d], with channels in the order that `rotate` works in.

        Reordering the channels of queries and keys alike leaves their products unchanged; reordering the weights
        is cheap, reordering activations is not.
        """

    @abstractmethod
    def rotate(self, q_bthd: Tensor, k_btgd: Tensor, span: Span, offset: int) -> tuple[Tensor, Tensor]:
        """Arranged queries and keys that carry their positions: the span's, or offset, offset+1, … where it has none."""

    def bias(self, offsets: Offsets) -> Tensor | None:
        """What is added to the scaled scores, [h, t, s] or [b, h, t, s], fp32 or finer; None where nothing is.

        Later keys (negative distances) get the value of distance 0. The mask hides them, unless the caller replaces
        the causal rule.
        """
        return None

    def parameter_roles(self) -> Roles:
        """Matrices of a position are neither queries' and keys' nor values' and outputs'."""
        return {name: "other" for name, parameter in self.named_parameters() if parameter.dim() >= 2}

    def bias_key(self) -> Hashable | None:
        """Equal keys promise equal biases, so that layers may share one; None where parameters decide."""
        return None

    def score_term(self, offsets: Offsets) -> ScoreTerm | None:
        """The bias of one score as a function of indices, for kernels that never hold all scores.

        For passes whose queries and keys are the same tokens in order, so that indices are places in the tensors. None
        where there is no bias, or where a kernel would gather gradients of its parameters more slowly than a tensor.
        """
        return None


class BiasedPosition(Position):
    """Base of positions that act through a bias alone: queries and keys stay as they are."""

    biased: ClassVar[bool] = True

    def arrange(self, weight: Tensor) -> Tensor:
        """The weight, unchanged."""
        return weight

    def rotate(self, q_bthd: Tensor, k_btgd: Tensor, span: Span, offset: int) -> tuple[Tensor, Tensor]:
        """Queries and keys, unchanged."""
        return q_bthd, k_btgd

    @abstractmethod
    def bias(self, offsets: Offsets) -> Tensor:
        """See `Position.bias`."""
