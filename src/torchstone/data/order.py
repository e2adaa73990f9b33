"""In which order a run sees its sequences: a new shuffle each epoch, each item exactly once per epoch.

Sequence number p of a run (p = step * batch size + row) lies in epoch p // n, at place p % n of that epoch's
shuffle.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from torchstone.data.keyed import key
from torchstone.data.permutation import Permutation


def item_at(numbers: ArrayLike, items: int, seed: int) -> NDArray[np.int64]:
    """Which of `items` sequences stands at each sequence number of a run with `seed`; int64, same shape."""
    given = np.asarray(numbers, dtype=np.int64)
    epochs, places = given // items, given % items
    found = np.empty_like(given)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = Permutation(items, key("order", seed, int(epoch)))(places[here])
    return found
