"""Decoding state: what a mixer remembers between the steps of generation.

Shapes: b batch · g key heads · s slots · d head width · t new tokens.

`KVCache` is the state of attention. Memory is allocated once. With a sliding window it is a ring of `window` slots:
token i lives in slot i mod window, so a long generation needs constant memory. Keys are stored after rotation, with
the index of each key recomputed from its slot, because attention does not care about the order of its keys; what does
care (a score processor that reads neighbouring scores) asks for them `in_order`.

Pitfalls: a state is changed in place by every call; copy it (`copy.deepcopy`) to branch. What it stores is detached,
so no gradient flows through a pass with a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torchstone.errors import ConfigError


class MixerState(Protocol):
    """State of one mixer. `length` counts the tokens seen so far, padding included."""

    length: int

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        ...


@dataclass
class DecoderState:
    """States of all blocks, in order."""

    layers: list[Any]

    @property
    def length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.layers[0].length

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes() for layer in self.layers)


class Keys(NamedTuple):
    """Keys and values that the new queries may see: old and new ones together.

    `index_s` holds the place of each key in the sequence, `segments_bs` its segment (None: all alike).
    `offset` is the place of the first new query. `ordered` tells whether `index_s` increases.
    """

    k_bgsd: Tensor
    v_bgse: Tensor
    index_s: Tensor
    segments_bs: Tensor | None
    offset: int
    ordered: bool = True

    def in_order(self) -> Keys:
        """The same keys by increasing index, for what reads neighbouring keys."""
        if self.ordered:
            return self
        order = self.index_s.argsort()
        segments_bs = None if self.segments_bs is None else self.segments_bs[:, order]
        return Keys(self.k_bgsd[:, :, order], self.v_bgse[:, :, order], self.index_s[order], segments_bs, self.offset)


class KVCache:
    """Preallocated keys and values of one attention layer.

    Args:
        batch, capacity: rows, and tokens that will ever be appended to a row.
        key_shape, value_shape: (heads, channels) of keys and of values; they may differ.
        window: sliding window in tokens; None keeps everything.
        device, dtype: of the stored tensors.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        key_shape: tuple[int, int],
        value_shape: tuple[int, int],
        window: int | None,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = capacity
        self.size = capacity if window is None else min(capacity, window)
        self.length = 0
        self.k_bgsd = torch.zeros(batch, key_shape[0], self.size, key_shape[1], device=device, dtype=dtype)
        self.v_bgse = torch.zeros(batch, value_shape[0], self.size, value_shape[1], device=device, dtype=dtype)
        self.segments_bs: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes of keys, values and segments."""
        tensors = [self.k_bgsd, self.v_bgse] + ([] if self.segments_bs is None else [self.segments_bs])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def extend(self, k_bgtd: Tensor, v_bgte: Tensor, segments_bt: Tensor | None) -> Keys:
        """Append t tokens and return every key that their queries may see.

        Raises:
            ConfigError: more tokens than the capacity that was asked for.
        """
        new = k_bgtd.shape[2]
        if self.length + new > self.capacity:
            raise ConfigError(
                f"the decoding state holds {self.length} of {self.capacity} tokens and {new} more were given; "
                "create it with new_state(capacity=prompt length + tokens to generate)."
            )
        segments_bt = self._segments_of(segments_bt, k_bgtd)
        if self.length + new <= self.size:
            store = self._append
        else:
            store = self._replace_oldest if new == 1 else self._roll
        keys = store(k_bgtd.detach(), v_bgte.detach(), segments_bt)
        self.length += new
        return keys

    def _segments_of(self, segments_bt: Tensor | None, k_bgtd: Tensor) -> Tensor | None:
        """Segments of the new tokens; once any were given, tokens without one belong to segment 0."""
        batch, _, new, _ = k_bgtd.shape
        if segments_bt is None:
            if self.segments_bs is None:
                return None
            return torch.zeros(batch, new, dtype=torch.long, device=k_bgtd.device)
        if self.segments_bs is None:
            self.segments_bs = torch.zeros(batch, self.size, dtype=torch.long, device=k_bgtd.device)
        return segments_bt

    def _append(self, k_bgtd: Tensor, v_bgte: Tensor, segments_bt: Tensor | None) -> Keys:
        """New tokens behind the old ones, in order."""
        start, stop = self.length, self.length + k_bgtd.shape[2]
        self.k_bgsd[:, :, start:stop] = k_bgtd
        self.v_bgse[:, :, start:stop] = v_bgte
        segments_bs = None
        if self.segments_bs is not None:
            assert segments_bt is not None
            self.segments_bs[:, start:stop] = segments_bt
            segments_bs = self.segments_bs[:, :stop]
        index_s = torch.arange(stop, device=k_bgtd.device)
        return Keys(self.k_bgsd[:, :, :stop], self.v_bgse[:, :, :stop], index_s, segments_bs, start)

    def _replace_oldest(self, k_bgtd: Tensor, v_bgte: Tensor, segments_bt: Tensor | None) -> Keys:
        """One token into a full ring: what it overwrites has just left its window, so the ring is the answer."""
        slot = self.length % self.size
        self.k_bgsd[:, :, slot : slot + 1] = k_bgtd
        self.v_bgse[:, :, slot : slot + 1] = v_bgte
        if self.segments_bs is not None:
            assert segments_bt is not None
            self.segments_bs[:, slot : slot + 1] = segments_bt
        slots = torch.arange(self.size, device=k_bgtd.device)
        index_s = self.length - (self.length - slots) % self.size
        return Keys(self.k_bgsd, self.v_bgse, index_s, self.segments_bs, self.length, ordered=False)

    def _roll(self, k_bgtd: Tensor, v_bgte: Tensor, segments_bt: Tensor | None) -> Keys:
        """New tokens into a full ring.

        The queries still see the old keys that their arrival pushes out, so the result is the ring (unrolled, oldest
        first) followed by the new tokens; only then is the ring overwritten.
        """
        start, new = self.length, k_bgtd.shape[2]
        old = min(start, self.size)
        index_s = torch.arange(start - old, start + new, device=k_bgtd.device)
        slots = index_s[:old] % self.size
        k_bgsd = torch.cat([self.k_bgsd[:, :, slots], k_bgtd.to(self.k_bgsd.dtype)], dim=2)
        v_bgse = torch.cat([self.v_bgse[:, :, slots], v_bgte.to(self.v_bgse.dtype)], dim=2)
        last = index_s[-self.size :] % self.size
        self.k_bgsd[:, :, last] = k_bgsd[:, :, -self.size :]
        self.v_bgse[:, :, last] = v_bgse[:, :, -self.size :]
        segments_bs = None
        if self.segments_bs is not None:
            assert segments_bt is not None
            segments_bs = torch.cat([self.segments_bs[:, slots], segments_bt], dim=1)
            self.segments_bs[:, last] = segments_bs[:, -self.size :]
        return Keys(k_bgsd, v_bgse, index_s, segments_bs, start)
