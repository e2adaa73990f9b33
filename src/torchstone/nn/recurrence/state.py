"""RecurrentState: what a recurrent mixer remembers between the steps of generation, of a size that does not grow.

Shapes: b batch · … whatever the mixer keeps per row.

Pitfalls: a state is changed in place by every call; copy it (`copy.deepcopy`) to branch. What it stores is detached. The
capacity only limits how many tokens are taken, as for attention, so that a model of both kinds behaves as one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from torchstone.errors import ConfigError

UNSEEN = -2  # document of a row that has seen no visible token yet


class RecurrentState:
    """Named tensors of one mixer, the first dimension of each being rows.

    Args:
        tensors: what the mixer keeps, at its initial values.
        capacity: tokens that will ever be given to a row.

    Attributes:
        tensors: the same, replaced by `advance`.
        length: tokens seen so far, padding included.
        documents_b: int64 document of the last visible token of each row, UNSEEN before the first.
    """

    def __init__(self, tensors: Mapping[str, Tensor], capacity: int) -> None:
        self.tensors = dict(tensors)
        self.capacity, self.length = capacity, 0
        first = next(iter(self.tensors.values()))
        self.documents_b = torch.full((first.shape[0],), UNSEEN, dtype=torch.long, device=first.device)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.documents_b.shape[0]

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.tensors.values(), self.documents_b))

    def advance(self, tokens: int, documents_b: Tensor, **tensors: Tensor) -> None:
        """Take the tensors after `tokens` more tokens.

        Args:
            tokens: how many.
            documents_b: document of the last visible token, from `boundaries`.
            tensors: a new value for each name, of the old shape; stored detached and in the old type.

        Raises:
            ConfigError: more tokens than the capacity that was asked for.
        """
        self.require_room(tokens)
        assert tensors.keys() == self.tensors.keys(), f"{sorted(tensors)} are not {sorted(self.tensors)}"
        for name, value in tensors.items():
            old = self.tensors[name]
            assert value.shape == old.shape, f"{name} has shape {tuple(value.shape)}, not {tuple(old.shape)}"
            self.tensors[name] = _alone(value.detach().to(old.dtype))
        self.documents_b, self.length = documents_b, self.length + tokens

    def require_room(self, tokens: int) -> None:
        """Raise ConfigError if `tokens` more would pass the capacity."""
        if self.length + tokens > self.capacity:
            raise ConfigError(
                f"the decoding state holds {self.length} of {self.capacity} tokens and {tokens} more were given; "
                "create it with new_state(capacity=prompt length + tokens to generate)."
            )

    def select(self, rows_n: Tensor) -> RecurrentState:
        """A copy that holds only these rows, in this order."""
        chosen = RecurrentState({name: tensor[rows_n] for name, tensor in self.tensors.items()}, self.capacity)
        chosen.length, chosen.documents_b = self.length, self.documents_b[rows_n]
        return chosen

    def join(self, other: RecurrentState) -> RecurrentState:
        """A copy that holds the rows of both; its length and capacity are the larger ones."""
        pairs = {name: torch.cat([tensor, other.tensors[name]]) for name, tensor in self.tensors.items()}
        both = RecurrentState(pairs, max(self.capacity, other.capacity))
        both.length = max(self.length, other.length)
        both.documents_b = torch.cat([self.documents_b, other.documents_b])
        return both


def _alone(value: Tensor) -> Tensor:
    """The tensor, copied where it is a part of a larger one, which it would keep in memory."""
    # a compiler knows no storages, and drops copies that are not needed
    if torch.compiler.is_compiling() or value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return value.clone(memory_format=torch.contiguous_format)
    return value


def require_tensors(state: Any, mixer: str, due: Mapping[str, tuple[int, ...]], fine: Collection[str]) -> None:
    """Raise ConfigError unless the state is one of this mixer.

    Args:
        state: whatever was given.
        mixer: its kind.
        due: shape of every tensor, rows first.
        fine: those that must be fp32 or finer.
    """
    given = state.tensors if isinstance(state, RecurrentState) else {}
    fits = {name: tuple(tensor.shape) for name, tensor in given.items()} == dict(due)
    if fits and all(given[name].dtype.itemsize >= torch.float32.itemsize for name in fine):
        return
    wanted = ", ".join(f"{name} {shape}{' in fp32' if name in fine else ''}" for name, shape in due.items())
    found = ", ".join(
        f"{name} {tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in given.items()
    )
    raise ConfigError(
        f"the state of {mixer} is {wanted} here, and {found or f'a {type(state).__name__}'} was given; make it with new_state "
        "of the same model, for as many rows."
    )
