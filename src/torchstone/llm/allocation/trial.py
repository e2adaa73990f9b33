"""One trial of a policy: fit it on some problems, evaluate it on others.

Policies: `mixed` (the fitted allocation), `pure` (train-selected single configuration), `uniform` (random
mixing) and `oracle` (the single configuration that is best on the test problems).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from torchstone.errors import ConfigError, DataError
from torchstone.llm.allocation.baselines import (
    evaluate_fixed,
    half_split,
    oracle_pure,
    pure_allocations,
    train_selected_pure,
    uniform_mixed,
)
from torchstone.llm.allocation.policy import Evaluation, OverlapWarning, allocate
from torchstone.llm.allocation.table import CountTable

POLICIES = ("mixed", "pure", "uniform", "oracle")


@dataclass(frozen=True)
class BudgetFigures:
    """What three policies solve at a budget, and how close the fitted one is to the best possible."""

    budget: int
    mixed: float
    pure: float
    uniform: float
    train_value: float
    upper_bound: float


def spend(policy: str, train: CountTable, test: CountTable, budget: int) -> tuple[Evaluation, float | None]:
    """Evaluate a policy on test problems; for `mixed` also the certified gap of its fit, else None.

    Raises:
        ConfigError: unknown policy.
        DataError: fewer test runs than samples.
    """
    if policy == "mixed":
        fitted = allocate(train.counts, train.runs, budget, configurations=train.configurations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OverlapWarning)  # a control may be in-sample on purpose
            return fitted.evaluate(test.counts, test.runs), fitted.gap
    if policy == "uniform":
        return uniform_mixed(test.counts, test.runs, budget), None
    if policy not in POLICIES:
        raise ConfigError(f"unknown policy {policy!r}; allowed: {', '.join(POLICIES)}.")
    chosen_s = (
        oracle_pure(test.counts, test.runs, budget)
        if policy == "oracle"
        else train_selected_pure(train.counts, train.runs, budget)
    )
    return evaluate_fixed(chosen_s, test.counts, test.runs, test.configurations), None


def random_halves(
    table: CountTable, seed: int, runs: int | None = None, in_sample: bool = False
) -> tuple[CountTable, CountTable]:
    """Training and test half of the problems for a seed.

    Seeds 2k and 2k + 1 use the same random halves with exchanged roles, so that an even number of seeds
    tests every problem equally often: how hard the tested half happens to be then cancels in the mean.

    Args:
        table: counts of all problems.
        seed: decides the halves and which runs are drawn; equal seeds give equal halves whatever `runs` is.
        runs: fit on this many runs per problem and configuration, drawn without replacement; None: all.
        in_sample: return the drawn table of all problems twice, the flaw that a held-out half avoids.
    """
    first, second = half_split(len(table.problems), np.random.default_rng([seed // 2, 1]))
    if seed % 2:
        first, second = second, first
    fewer = table if runs is None else subsample(table, runs, np.random.default_rng([seed, 2, runs]))
    return (fewer, fewer) if in_sample else (fewer.rows(first), table.rows(second))


def subsample(table: CountTable, runs: int, generator: np.random.Generator) -> CountTable:
    """The table as it would be with only `runs` runs per cell, drawn without replacement.

    Raises:
        DataError: some cell has fewer runs.
    """
    if runs < 1 or runs > table.runs.min():
        raise DataError(f"cannot draw {runs} runs where the table has {table.runs.min()}; ask for 1 to that many.")
    counts_ps = generator.hypergeometric(table.counts, table.runs - table.counts, runs)
    return replace(table, counts=counts_ps, runs=np.full_like(table.runs, runs))


def by_budget(train: CountTable, test: CountTable, budgets: Sequence[int]) -> list[BudgetFigures]:
    """Test values of the policies, train value and upper bound, for every budget."""
    rows = []
    for budget in budgets:
        fitted = allocate(train.counts, train.runs, budget)
        mixed = fitted.evaluate(test.counts, test.runs).value
        pure, uniform = (spend(policy, train, test, budget)[0].value for policy in ("pure", "uniform"))
        rows.append(BudgetFigures(budget, mixed, pure, uniform, fitted.train_value, fitted.upper_bound))
    return rows


def samples_to_match(train: CountTable, test: CountTable, budget: int) -> list[tuple[str, int, int | None]]:
    """How many samples of the fitted split solve as much as `budget` samples of one configuration.

    "x less compute" depends on what it is compared with, so both readings are given: the configuration that
    is best at this budget, and the one that is best with a single sample (both on the test problems).

    Returns:
        (reference, index of its configuration, samples or None if `budget` of them do not suffice).
    """
    fitted = allocate(train.counts, train.runs, budget, method="greedy")
    mixed_j = fitted.evaluate_curve(test.counts, test.runs).mean(axis=1)
    found: list[tuple[str, int, int | None]] = []
    for reference, at in (("best at the same budget", budget), ("best with one sample", 1)):
        chosen = int(np.argmax(oracle_pure(test.counts, test.runs, at)))
        pure_s = pure_allocations(budget, np.ones(len(test.configurations)))[chosen]
        target = evaluate_fixed(pure_s, test.counts, test.runs).value
        enough = np.flatnonzero(mixed_j >= target)
        found.append((reference, chosen, int(enough[0]) if enough.size else None))
    return found
