"""The biases of positions as plain loops over heads, queries and keys, in the order of the papers' equations.

For tests and for reading: slow, one causal sequence without a batch, fp64. Shapes: [h, t, t]; later keys are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor


def _fill(heads: int, length: int, value: Callable[[int, int, int], float]) -> Tensor:
    """value(head, query, key) wherever the key is not later."""
    bias = torch.zeros(heads, length, length, dtype=torch.float64)
    for h in range(heads):
        for i in range(length):
            for j in range(i + 1):
                bias[h, i, j] = value(h, i, j)
    return bias


def alibi(heads: int, length: int) -> Tensor:
    """Fixed slopes: powers of 2^(−8/n) for a power of two n, and every second one of 2n for the heads beyond."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return _fill(heads, length, lambda h, i, j: -slopes[h] * (i - j))


def kerple(p: list[float], a: list[float], length: int) -> Tensor:
    """Logarithmic, with both parameters kept at 0.01 or above."""
    p, a = ([max(value, 0.01) for value in values] for values in (p, a))
    return _fill(len(p), length, lambda h, i, j: -p[h] * log(1 + a[h] * (i - j)))


def fire(weights: dict[str, Tensor], threshold: float, leak: float, length: int) -> Tensor:
    """The network of the relative distance; `weights` by the names of `FIRE`."""
    c, limit = float(weights["c"]), abs(float(weights["m"]) * threshold)
    w1, b1 = weights["network.hidden_weight"][:, 0].tolist(), weights["network.hidden_bias"].tolist()
    w2, b2 = weights["network.out_weight"].tolist(), weights["network.out_bias"].tolist()

    def value(h: int, i: int, j: int) -> float:
        u = log(abs(c * (i - j)) + 1) / (log(abs(c * max(i, limit)) + 1) + 1e-6)
        hidden = [w * u + b for w, b in zip(w1, b1, strict=True)]
        hidden = [x if x > 0 else leak * x for x in hidden]
        return b2[h] + sum(w * x for w, x in zip(w2[h], hidden, strict=True))

    return _fill(len(w2), length, value)
