"""All pairs: few combinations in which every two values of different factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

Combination = dict[str, str]


def pairs_of(combination: Combination) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """Every two (factor, value) of a combination, in the order of its factors."""
    return set(itertools.combinations(combination.items(), 2))


def all_pairs(
    factors: Mapping[str, Sequence[str]], possible: Callable[[Combination], bool] = lambda combination: True
) -> list[Combination]:
    """Combinations that contain every pair of values which some possible combination contains.

    Greedy: each new combination starts from a pair that is still missing and takes, factor by factor, the value with the most
    missing pairs. Deterministic.
    """
    every = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    candidates = [(combination, pairs_of(combination)) for combination in every if possible(combination)]
    missing = set().union(*(pairs for _, pairs in candidates))
    chosen: list[Combination] = []
    while missing:
        best, pairs = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        chosen.append(best)
        missing -= pairs
    return chosen
