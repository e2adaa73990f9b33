"""The optimal allocation by enumeration, where there are few enough.

Every configuration is expanded in turn by all counts that the rest of the budget pays for; the last one
takes all that is left, since more samples never hurt. With unit costs that is C(C+S-1, S-1) allocations:
all budgets up to 10 with 10 configurations. The limit keeps it below about 0.2 s.
"""

from __future__ import annotations

import math

import numpy as np

from torchstone.llm.allocation.greedy import affordable
from torchstone.llm.allocation.objectives import Floats, Ints

LIMIT = 100_000
_ROWS = 4096


def candidates(budget: float, cost_s: Floats, limit: int = LIMIT) -> Ints | None:
    """(M, S) allocations that use up the budget, large counts of the first ones first; None above `limit`."""
    if (cost_s == cost_s[0]).all():
        most = int(affordable(budget, cost_s)[0])
        if math.comb(most + cost_s.size - 1, cost_s.size - 1) > limit:
            return None
    rows = np.zeros((1, 0), dtype=np.int64)
    left = np.array([float(budget)])
    for cost in cost_s[:-1]:
        most_m = affordable_rows(left, float(cost))
        if int((most_m + 1).sum()) > limit:
            return None
        repeated = np.repeat(np.arange(rows.shape[0]), most_m + 1)
        starts = np.repeat(np.cumsum(most_m + 1) - most_m - 1, most_m + 1)
        taken = most_m[repeated] - (np.arange(repeated.size) - starts)
        rows = np.concatenate([rows[repeated], taken[:, None]], axis=1)
        left = left[repeated] - taken * cost
    last = affordable_rows(left, float(cost_s[-1]))
    return np.concatenate([rows, last[:, None]], axis=1)


def affordable_rows(left: Floats, cost: float) -> Ints:
    """(M,) samples of one configuration that fit into each remaining budget."""
    return np.maximum(0, np.floor(left / cost * (1 + 1e-12) + 1e-9)).astype(np.int64)


def best_of(rates_ps: Floats, allocations_ms: Ints) -> Ints:
    """(S,) the allocation of the largest train value; ties go to the first row."""
    log_sp = np.log(np.maximum(1 - rates_ps, 1e-12)).T
    failures = [
        np.exp(allocations_ms[start : start + _ROWS] @ log_sp).mean(axis=1)
        for start in range(0, allocations_ms.shape[0], _ROWS)
    ]
    failure_m = np.concatenate(failures)
    return np.asarray(allocations_ms[int(np.argmax(failure_m <= failure_m.min() + 1e-13))])


def exact(rates_ps: Floats, budget: float, cost_s: Floats) -> Ints | None:
    """(S,) the optimal allocation, or None where there are more than `LIMIT` candidates."""
    if affordable(budget, cost_s).max() == 0:
        return np.zeros(cost_s.size, dtype=np.int64)
    rows = candidates(budget, cost_s)
    return None if rows is None else best_of(rates_ps, rows)
