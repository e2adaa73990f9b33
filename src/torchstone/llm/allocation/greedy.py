"""Greedy allocation, and exchanges that polish it.

`greedy_path` starts from nothing and always adds the sample that lowers the mean failure most per unit of
cost:

    gain_i = mean_p F[p] q[p,i],   F[p] = Π_i (1 - q[p,i])^n_i   (updated in place)

One pass of O(C S P) gives the allocation for every budget up to C, each an extension of the one before. The
objective has diminishing returns on the integer lattice, so greedy reaches at least 1 - 1/e of the optimum;
in practice nearly all of it. `exchange` then moves one sample at a time from one configuration to another
while the value rises.

Ties (all-zero columns, equal columns) go to the lowest index, so results repeat.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchstone.llm.allocation.objectives import Floats, Ints, failure, train_value

_TIE = 1e-12


@dataclass(frozen=True)
class Path:
    """A nested sequence of allocations, one sample added at each step.

    Attributes:
        steps: (J,) configuration added at step j.
        cost: (J + 1,) cost spent after j steps, from 0.
        value: (J + 1,) train value f after j steps, from 0.
    """

    steps: Ints
    cost: Floats
    value: Floats

    def allocations(self, configurations: int) -> Ints:
        """(J + 1, S) allocation after every step."""
        return nested(self.steps, configurations)


def nested(steps: Ints, configurations: int) -> Ints:
    """(J + 1, S) running totals of a sequence of configuration indices, from nothing."""
    one_hot = np.zeros((steps.size + 1, configurations), dtype=np.int64)
    one_hot[np.arange(1, steps.size + 1), steps] = 1
    return one_hot.cumsum(axis=0)


def greedy_path(rates_ps: Floats, budget: float, cost_s: Floats) -> Path:
    """Add samples by gain per cost until none fits into the budget.

    Args:
        rates_ps: (P, S) success probabilities.
        budget: total cost allowed.
        cost_s: (S,) cost of one sample, > 0.
    """
    weight_sp = np.ascontiguousarray((rates_ps / cost_s).T)
    keep_sp = np.ascontiguousarray((1 - rates_ps).T)
    same_cost = bool((cost_s == cost_s[0]).all())
    failure_p = np.ones(rates_ps.shape[0])
    left = budget
    steps: list[int] = []
    values: list[float] = [0.0]
    spent: list[float] = [0.0]
    while True:
        gain_s = weight_sp @ failure_p
        if same_cost:
            if not _fits(cost_s[0], left, budget):
                break
        else:
            fits_s = cost_s <= left + 1e-9 * budget
            if not fits_s.any():
                break
            gain_s = np.where(fits_s, gain_s, -1.0)
        best = int(np.argmax(gain_s >= gain_s.max() * (1 - _TIE)))
        failure_p *= keep_sp[best]
        steps.append(best)
        spent.append(spent[-1] + float(cost_s[best]))
        left = budget - spent[-1]
        values.append(1 - float(failure_p.mean()))
    return Path(np.array(steps, dtype=np.int64), np.array(spent), np.array(values))


def guarded(rates_ps: Floats, path: Path, budget: float, cost_s: Floats) -> Ints:
    """(S,) final allocation of the path, or the best repeated single configuration where that is better.

    With unequal costs gain per cost alone can be arbitrarily bad (a cheap sample blocks the one that would
    have solved most); comparing with single configurations is the usual knapsack guard.
    """
    chosen_s = path.allocations(cost_s.size)[-1]
    best = train_value(rates_ps, chosen_s)
    for s, most in enumerate(affordable(budget, cost_s)):
        single_s = np.zeros_like(chosen_s)
        single_s[s] = most
        value = train_value(rates_ps, single_s)
        if value > best + _TIE:
            chosen_s, best = single_s, value
    return chosen_s


def affordable(budget: float, cost_s: Floats) -> Ints:
    """(S,) how many samples of each configuration alone fit into the budget (with room for rounding)."""
    return np.floor(budget / cost_s * (1 + 1e-12) + 1e-9).astype(np.int64)


def exchange(rates_ps: Floats, start_s: Ints, budget: float, cost_s: Floats) -> Ints:
    """Move one sample from a to b (or add one that fits) while the train value rises; best move first.

    All S × S moves are valued at once: with F_a the failures without one sample of a, moving it to b leaves
    mean_p F_a[p] (1 - q[p,b]).
    """
    current_s = start_s.copy()
    keep_ps = 1 - rates_ps
    count = cost_s.size
    while True:
        now = float(failure(rates_ps, current_s).mean())
        without_as = current_s - np.eye(count, dtype=np.int64)
        without_as = np.vstack([without_as, current_s])  # the last row removes nothing: add one
        power_aps = keep_ps[None] ** np.maximum(without_as, 0)[:, None, :]
        after_ab = power_aps.prod(axis=2) @ keep_ps / keep_ps.shape[0]
        room_a = budget - without_as @ cost_s
        allowed_ab = (room_a[:, None] + 1e-9 * budget >= cost_s) & (without_as.min(axis=1) >= 0)[:, None]
        after_ab = np.where(allowed_ab, after_ab, np.inf)
        a, b = np.unravel_index(int(np.argmin(after_ab)), after_ab.shape)
        if not after_ab[a, b] < now - _TIE:
            return current_s
        current_s = without_as[a].copy()
        current_s[b] += 1


def sample_order(rates_ps: Floats, allocation_s: Ints, cost_s: Floats) -> tuple[Ints, float]:
    """Order in which to draw the samples of an allocation: largest remaining gain per cost first.

    With a verifier one stops at the first success; this order keeps the expected number of draws small.

    Returns:
        (n,) configuration indices, and the mean number of draws per problem: a sample is drawn if all
        before it fail.
    """
    left_s = allocation_s.copy()
    failure_p = np.ones(rates_ps.shape[0])
    weight_sp, keep_sp = (rates_ps / cost_s).T.copy(), (1 - rates_ps).T.copy()
    order = np.empty(int(left_s.sum()), dtype=np.int64)
    draws = 0.0
    for position in range(order.size):
        draws += float(failure_p.mean())
        gain_s = np.where(left_s > 0, weight_sp @ failure_p, -1.0)
        best = int(np.argmax(gain_s >= gain_s.max() * (1 - _TIE)))
        order[position] = best
        left_s[best] -= 1
        failure_p *= keep_sp[best]
    return order, draws


def _fits(cost: float, left: float, budget: float) -> bool:
    return bool(cost <= left + 1e-9 * budget)
