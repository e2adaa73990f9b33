"""Speed of sample allocation: the whole curve to 256 samples, against the published procedure.

    python benchmarks/allocation.py

Prints the time of one greedy pass that gives every budget from 1 to 256 (promise: below 20 ms on
BigCodeBench-Hard), of `allocate` with its certificate, and the ratio to hill climbing written as the paper
describes it (a random start, every trial valued from scratch), alternating in one run. Without the
published table the same is measured on a generated one of its size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from torchstone.data.published import notice, published
from torchstone.llm.allocation import allocate, read_table
from torchstone.llm.allocation.greedy import greedy_path
from torchstone.llm.allocation.objectives import success_rates
from torchstone.llm.allocation.populations import generate_table

DATA = "osca/bigcodebench_hard.csv"
BUDGET = 256
BUDGETS = (2, 4, 8, 16, 32, 64, 128, 256)


def published_procedure(rates: list[list[float]], budget: int, rng: np.random.Generator) -> float:
    """Hill climbing over a sequence of configurations with plain loops; returns the value reached."""
    configurations = len(rates[0])

    def value(sequence: list[int]) -> float:
        samples = [sequence.count(i) for i in range(configurations)]
        solved = 0.0
        for problem in rates:
            unsolved = 1.0
            for rate, count in zip(problem, samples, strict=True):
                unsolved *= (1 - rate) ** count
            solved += 1 - unsolved
        return solved / len(rates)

    sequence = [int(i) for i in rng.integers(0, configurations, budget)]
    best, changed = value(sequence), True
    while changed:
        changed = False
        for position in range(budget):
            for candidate in range(configurations):
                held = sequence[position]
                if candidate == held:
                    continue
                sequence[position] = candidate
                found = value(sequence)
                if found > best:
                    best, changed = found, True
                else:
                    sequence[position] = held
    return best


def timed(action: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    path = published(DATA)
    table = read_table(path) if path else generate_table("complementary", 148, 10, 300, np.random.default_rng(0))
    print(f"table: {table.source}" + ("" if path else f"; {notice(DATA)}"))
    train = table.part("train")
    rates = success_rates(train.counts, train.runs)
    plain, ones = rates.tolist(), np.ones(rates.shape[1])

    curve = [timed(lambda: greedy_path(rates, BUDGET, ones)) for _ in range(30)]
    everything = [timed(lambda: allocate(train.counts, train.runs, BUDGET)) for _ in range(10)]
    print(f"whole curve to {BUDGET} samples: {statistics.median(curve):.2f} ms (promise < 20 ms)")
    print(f"allocate({BUDGET}) with swaps, order and certificate: {statistics.median(everything):.2f} ms")

    ours, theirs = [], []
    for repeat in range(3):
        ours.append(timed(lambda: greedy_path(rates, BUDGET, ones)))
        seconds = 0.0
        for budget in BUDGETS:
            rng = np.random.default_rng([repeat, budget])
            seconds += timed(lambda budget=budget, rng=rng: published_procedure(plain, budget, rng))
        theirs.append(seconds)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"published procedure, plain loops, budgets {BUDGETS}: {statistics.median(theirs):.0f} ms")
    print(f"ratio to our curve of all {BUDGET} budgets: {ratio:.0f}x")
    final = allocate(train.counts, train.runs, BUDGET)
    reached = published_procedure(plain, BUDGET, np.random.default_rng(0))
    print(f"train value at {BUDGET}: ours {final.train_value:.6f}, published procedure {reached:.6f}")


if __name__ == "__main__":
    main()
