"""A shuffle of 0 … n-1 that is computed, not stored: item i of a shuffle of a billion costs a few operations.

A Feistel network is a keyed bijection on pairs of half-words (left, right) -> (right, left XOR f(right)),
whatever f is. Its domain is the next power of four >= n; a result outside 0 … n-1 is sent through again
("cycle walking"), which keeps it a bijection and takes fewer than four passes on average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchstone.data.keyed import Keys, mix, words

ROUNDS = 8


class Permutation:
    """Bijection of 0 … n-1 chosen by a key.

    Args:
        n: number of items, at least 1.
        key: one key of `torchstone.data.keyed.key`.
    """

    def __init__(self, n: int, key: Keys) -> None:
        assert n >= 1 and key.shape == (1,)
        self.n = n
        self._half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._rounds = words(key, ROUNDS)[0]

    def __call__(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Images of indices (any shape, each in 0 … n-1), int64."""
        given = np.asarray(indices)
        assert given.size == 0 or (given.min() >= 0 and given.max() < self.n)
        flat = self._pass(given.reshape(-1).astype(np.uint64))
        while (outside := np.flatnonzero(flat >= self.n)).size:
            flat[outside] = self._pass(flat[outside])
        return flat.astype(np.int64).reshape(given.shape)

    def _pass(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for constant in self._rounds:
            left, right = right, left ^ (mix(right + constant) & self._mask)
        return (left << self._half) | right
