"""Random numbers as a pure function of a key: any row of any step, in any order, on any machine.

The generator is SplitMix64 used as a hash: number i of key k is mix(k + (i + 1) * golden). It is a few array
operations, so that thousands of rows with a key each are made at once, and it does not change with the numpy
version.

Shapes: b keys · n numbers per key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix(values: ArrayLike) -> Keys:
    """Scramble 64-bit words; a bijection in which every input bit moves every output bit."""
    z = np.atleast_1d(np.asarray(values, dtype=np.uint64))
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


def key(*parts: int | str | NDArray) -> Keys:
    """Keys [b] of a path of names and whole numbers >= 0; array parts are broadcast.

    `key("train", seed, step, rows)` differs from every other path and from every order of the same parts.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        for word in _words(part):
            state = mix(mix(state + _GOLDEN) + word * _GOLDEN)
    return state


def _words(part: int | str | NDArray) -> list[Keys]:
    if isinstance(part, str):
        data = part.encode()
        padded = data + b"\0" * (-len(data) % 8)
        words = np.frombuffer(padded, dtype="<u8").astype(np.uint64)
        return [np.full(1, len(data), dtype=np.uint64), *(words[i : i + 1] for i in range(len(words)))]
    return [np.atleast_1d(np.asarray(part, dtype=np.uint64))]


def words(keys_b: Keys, count: int) -> Keys:
    """`count` random 64-bit words per key: [b, n]."""
    steps_n = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return mix(keys_b[:, None] + steps_n[None, :])


def uniform(keys_b: Keys, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), 53 bits each: [b, n]."""
    return (words(keys_b, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(keys_b: Keys, count: int, high: int) -> NDArray[np.int64]:
    """Whole numbers 0 … high-1: [b, n]. Uneven by at most high / 2**53."""
    return (uniform(keys_b, count) * high).astype(np.int64)
