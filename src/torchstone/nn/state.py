"""Decoding state: what a mixer remembers between the steps of generation.

Shapes: b batch · n chosen rows · g key heads · s slots · c columns · d key channels · e value channels · t new tokens.

All rows of a state have seen equally many columns, padding included (`length`). Rows come and go: `select` takes some of
them, `join` puts two states together. Rows of a shorter state are aligned on the right, behind columns that take no part;
indices then count from another origin, which changes nothing, because masks and biases read differences of indices and
keys are stored after rotation. `trim` drops columns in front that no row uses any more.

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
import torch.nn.functional as F
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.span import NOWHERE


class MixerState(Protocol):
    """State of one mixer. `length` counts the tokens seen so far, padding included; `capacity` is the most it takes."""

    length: int
    capacity: int

    @property
    def batch(self) -> int:
        """Rows."""
        ...

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        ...

    def select(self, rows_n: Tensor) -> Any:
        """A copy that holds only these rows, in this order."""
        ...

    def join(self, other: Any) -> Any:
        """A copy that holds the rows of both, aligned on the right; its length and capacity are the larger ones."""
        ...


@dataclass
class DecoderState:
    """States of all blocks, in order."""

    layers: list[Any]

    @property
    def length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        """Tokens that fit, padding included."""
        return self.layers[0].capacity

    @property
    def batch(self) -> int:
        """Rows."""
        return self.layers[0].batch

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes() for layer in self.layers)

    def select(self, rows_n: Tensor) -> DecoderState:
        """A copy that holds only these rows (int64), in this order."""
        return DecoderState([layer.select(rows_n) for layer in self.layers])

    def join(self, other: DecoderState) -> DecoderState:
        """A copy that holds the rows of both, aligned on the right; its length and capacity are the larger ones.

        Raises:
            ConfigError: the states are of different models.
        """
        if [type(layer) for layer in self.layers] != [type(layer) for layer in other.layers]:
            raise ConfigError(
                f"decoding states of different models cannot be joined: one has {len(self.layers)} layers, the other "
                f"{len(other.layers)}, or their mixers differ; join states that one model made."
            )
        return DecoderState([mine.join(theirs) for mine, theirs in zip(self.layers, other.layers, strict=True)])

    def trim(self, columns: int, capacity: int | None = None) -> None:
        """Forget the first columns, which no row may need any more, and set the capacity (None: as it is).

        Raises:
            ConfigError: more columns than there are, or a capacity below what is left.
        """
        room = self.capacity if capacity is None else capacity
        if not 0 <= columns <= self.length or room < max(1, self.length - columns):
            raise ConfigError(
                f"the decoding state holds {self.length} tokens: it cannot forget {columns} and keep room for {room}; "
                "forget at most what it holds, and give a capacity for what is left."
            )
        for place, layer in enumerate(self.layers):
            if isinstance(layer, KVCache):
                self.layers[place] = layer.trimmed(columns, room)
            else:  # what keeps nothing per token only counts
                layer.length, layer.capacity = layer.length - columns, room

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens, padding included; less than there is changes nothing."""
        if capacity > self.capacity:
            self.trim(0, capacity)


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
        self.capacity, self.window = capacity, window
        self.size = capacity if window is None else min(capacity, window)
        self.length = 0
        self.k_bgsd = torch.zeros(batch, key_shape[0], self.size, key_shape[1], device=device, dtype=dtype)
        self.v_bgse = torch.zeros(batch, value_shape[0], self.size, value_shape[1], device=device, dtype=dtype)
        self.segments_bs: Tensor | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return self.k_bgsd.shape[0]

    def nbytes(self) -> int:
        """Bytes of keys, values and segments."""
        tensors = [self.k_bgsd, self.v_bgse] + ([] if self.segments_bs is None else [self.segments_bs])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def select(self, rows_n: Tensor) -> KVCache:
        """A copy that holds only these rows, in this order."""
        return self._like(self._held().rows(rows_n), self.length, self.capacity)

    def join(self, other: KVCache) -> KVCache:
        """A copy that holds the rows of both.

        Rows of the shorter one are aligned on the right: NOWHERE stands before them. Length and capacity are the larger ones.
        """
        length, capacity = max(self.length, other.length), max(self.capacity, other.capacity)
        columns = min(length, capacity if self.window is None else min(capacity, self.window))
        mine, theirs = self._held(), other._held()
        uneven = min(mine.columns, theirs.columns) < columns
        segmented = uneven or mine.segments_bc is not None or theirs.segments_bc is not None
        mine, theirs = mine.last(columns, segmented), theirs.last(columns, segmented)
        return self._like(mine.above(theirs), length, capacity)

    def trimmed(self, columns: int, capacity: int) -> KVCache:
        """A copy without the first columns and with this capacity; without segments where all that is left is segment 0."""
        held = self._held()
        held = held.last(min(held.columns, self.length - columns), held.segments_bc is not None)
        if held.segments_bc is not None and held.segments_bc.device.type != "meta" and not held.segments_bc.any():
            held = held._replace(segments_bc=None)
        return self._like(held, self.length - columns, capacity)

    def _held(self) -> _Held:
        """What is stored, oldest first; views as long as the ring has not come around."""
        count = min(self.length, self.size)
        first = (self.length - count) % self.size
        k_bgcd, v_bgce = _in_order(self.k_bgsd, first, count, 2), _in_order(self.v_bgse, first, count, 2)
        segments_bs = self.segments_bs
        return _Held(k_bgcd, v_bgce, None if segments_bs is None else _in_order(segments_bs, first, count, 1))

    def _like(self, held: _Held, length: int, capacity: int) -> KVCache:
        """A cache of this kind whose last tokens are these."""
        rows, heads, _, channels = held.k_bgcd.shape
        shapes = (heads, channels), (held.v_bgce.shape[1], held.v_bgce.shape[3])
        made = KVCache(rows, capacity, *shapes, self.window, self.k_bgsd.device, self.k_bgsd.dtype)
        made.length = length
        first = (length - held.columns) % made.size
        _put(made.k_bgsd, held.k_bgcd, first, 2)
        _put(made.v_bgse, held.v_bgce, first, 2)
        if held.segments_bc is not None:
            made.segments_bs = held.segments_bc.new_zeros(rows, made.size)
            _put(made.segments_bs, held.segments_bc, first, 1)
        return made

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


class _Held(NamedTuple):
    """Columns of a cache, oldest first."""

    k_bgcd: Tensor
    v_bgce: Tensor
    segments_bc: Tensor | None

    @property
    def columns(self) -> int:
        return self.k_bgcd.shape[2]

    def rows(self, rows_n: Tensor) -> _Held:
        """Some rows."""
        return _Held(
            self.k_bgcd[rows_n], self.v_bgce[rows_n], None if self.segments_bc is None else self.segments_bc[rows_n]
        )

    def above(self, other: _Held) -> _Held:
        """The rows of both, which have as many columns."""
        segments = [held.segments_bc for held in (self, other) if held.segments_bc is not None]
        k_bgcd, v_bgce = torch.cat([self.k_bgcd, other.k_bgcd]), torch.cat([self.v_bgce, other.v_bgce])
        return _Held(k_bgcd, v_bgce, torch.cat(segments) if segments else None)

    def last(self, columns: int, segmented: bool) -> _Held:
        """The last columns; where there are too few, empty ones that belong NOWHERE before them."""
        start, missing = max(0, self.columns - columns), max(0, columns - self.columns)
        k_bgcd, v_bgce = (F.pad(x[:, :, start:], (0, 0, missing, 0)) for x in (self.k_bgcd, self.v_bgce))
        if not segmented:
            return _Held(k_bgcd, v_bgce, None)
        segments_bc = self.segments_bc
        if segments_bc is None:
            segments_bc = torch.zeros(len(k_bgcd), self.columns, dtype=torch.long, device=k_bgcd.device)
        return _Held(k_bgcd, v_bgce, F.pad(segments_bc[:, start:], (missing, 0), value=NOWHERE))


def _in_order(ring: Tensor, first: int, count: int, dim: int) -> Tensor:
    """`count` slots of a ring, from slot `first` on."""
    ahead = min(count, ring.shape[dim] - first)
    if ahead == count:
        return ring.narrow(dim, first, count)
    return torch.cat([ring.narrow(dim, first, ahead), ring.narrow(dim, 0, count - ahead)], dim)


def _put(ring: Tensor, columns: Tensor, first: int, dim: int) -> None:
    """Write columns into a ring, from slot `first` on."""
    count = columns.shape[dim]
    ahead = min(count, ring.shape[dim] - first)
    ring.narrow(dim, first, ahead).copy_(columns.narrow(dim, 0, ahead))
    ring.narrow(dim, 0, count - ahead).copy_(columns.narrow(dim, ahead, count - ahead))


def require_rows(state: Any, batch: int) -> None:
    """Raise ConfigError unless the state holds `batch` rows."""
    if state.batch != batch:
        raise ConfigError(
            f"the decoding state holds {state.batch} rows and {batch} rows of tokens were given; create it with "
            f"new_state({batch}, …), or take the rows that go on with state.select(rows)."
        )
