"""The authors' optimiser, kept for replication: a random start improved position by position.

C configuration indices are drawn uniformly. One sweep goes through the positions; at each, every other
configuration is tried in index order and kept at once if the value rises strictly. Sweeps repeat until one
changes nothing. Every trial values the whole allocation again, so a sweep costs C S evaluations;
`greedy_path` reaches the same or a better value some hundred times faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchstone.errors import ConfigError
from torchstone.llm.allocation.objectives import Floats, Ints, train_value


def hill_climb(rates_ps: Floats, start: Sequence[int]) -> Ints:
    """(S,) local optimum reached from a start sequence of configuration indices, one per sample.

    Raises:
        ConfigError: an empty start, or an index that is not a configuration.
    """
    count = rates_ps.shape[1]
    sequence = [int(index) for index in start]
    if not sequence or min(sequence) < 0 or max(sequence) >= count:
        raise ConfigError(
            f"a start sequence needs indices from 0 to {count - 1}, one per sample; given {sequence[:10]}."
        )
    current_s = np.bincount(sequence, minlength=count)
    best = train_value(rates_ps, current_s)
    changed = True
    while changed:
        changed = False
        for position in range(len(sequence)):
            for candidate in range(count):
                held = sequence[position]
                if candidate == held:
                    continue
                current_s[held] -= 1
                current_s[candidate] += 1
                value = train_value(rates_ps, current_s)
                if value > best:
                    best, changed, sequence[position] = value, True, candidate
                else:
                    current_s[held] += 1
                    current_s[candidate] -= 1
    return np.asarray(current_s, dtype=np.int64)


def random_start(budget: int, configurations: int, generator: np.random.Generator) -> list[int]:
    """`budget` configuration indices, uniform and independent."""
    return [int(index) for index in generator.integers(0, configurations, budget)]
