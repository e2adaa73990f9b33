"""Shapes of a decay: from the peak rate towards a floor in D steps.

With r the floor as a multiple of the peak, step k = 0 … D has p = k/D and

    inv           1 / ((1/r − 1) · max(k, 1)/D + 1), at least r      a straight line in 1/rate (Wen et al. 2024)
    linear        1 − (1 − r) p
    cosine        r + (1 − r) · ½ (1 + cos πp)
    exponential   r^p                                                a straight line in log rate (JetMoE)
    sqrt          1 − (1 − r) √p                                     "1 − sqrt" (Hägele et al. 2024), falls fastest at first
    constant      1

Pitfalls
  inv    its first two steps, k = 0 and 1, have the same rate, as in the published code. Why this shape: 1/rate grows by the
         curvature with every step of the greedy optimum on a noisy slope; see `torchstone.optim.schedules.theory`.
  ends   k = 0 is the first step of the decay and still has the peak (all but inv); k = D, at the floor, comes one step after
         the last one. `wsd` counts from 1 instead: its last step is at the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Shape = Literal["inv", "linear", "cosine", "exponential", "sqrt", "constant"]
NEEDS_A_FLOOR = ("inv", "exponential")  # never reach 0

# By the share p of the decay, as `wsd` counts. Where a shape below is written out again, it is in the order of operations of the
# published code of its style, which rounds differently in the last bit.
OF_SHARE: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda p, floor: floor**p,
    "linear": lambda p, floor: 1 - (1 - floor) * p,
    "cosine": lambda p, floor: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * p)),
    "sqrt": lambda p, floor: 1 - (1 - floor) * math.sqrt(p),
}


def _inv(k: int, length: int, floor: float) -> float:
    return max(floor, 1 / ((1 / floor - 1) * max(k, 1) / length + 1))


def _linear(k: int, length: int, floor: float) -> float:
    return 1 + (floor - 1) * k / length


def _cosine(k: int, length: int, floor: float) -> float:
    return (1 - floor) * 0.5 * (1 + math.cos(math.pi * k / length)) + floor


def _exponential(k: int, length: int, floor: float) -> float:
    return OF_SHARE["exponential"](k / length, floor)


def _sqrt(k: int, length: int, floor: float) -> float:
    return OF_SHARE["sqrt"](k / length, floor)


def _constant(k: int, length: int, floor: float) -> float:
    return 1.0


SHAPES: dict[str, Callable[[int, int, float], float]] = {
    "inv": _inv,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "sqrt": _sqrt,
    "constant": _constant,
}
