"""What an allocation is measured against, and honest splits of the problems.

    train-selected pure   all samples on the configuration with the highest train value at this budget:
                          the fair single-configuration baseline
    oracle pure           the single configuration that is best on the *test* problems: nobody can choose it
    uniform mixed         every sample from a configuration drawn uniformly, in expectation

`cross_validate` fits on all folds but one and evaluates on that one, for every fold, so each problem is
evaluated once by an allocation that never saw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from torchstone.errors import ConfigError
from torchstone.llm.allocation.greedy import affordable, nested
from torchstone.llm.allocation.objectives import (
    Floats,
    Ints,
    check_counts,
    success_rates,
    train_value,
    unbiased_failure,
    uniform_failure,
)
from torchstone.llm.allocation.policy import Allocation, Evaluation, Method, allocate, check_cost


def pure_allocations(budget: float, cost_s: Floats) -> Ints:
    """(S, S) allocations that spend the whole budget on one configuration."""
    return np.diag(affordable(budget, cost_s))


def train_selected_pure(counts: ArrayLike, runs: ArrayLike, budget: float, cost: ArrayLike | None = None) -> Ints:
    """(S,) the whole budget on the configuration with the highest train value; ties: lowest index."""
    counts_ps, runs_ps = check_counts(counts, runs)
    pure_ss = pure_allocations(budget, check_cost(cost, [str(s) for s in range(counts_ps.shape[1])]))
    rates_ps = success_rates(counts_ps, runs_ps)
    values = np.array([train_value(rates_ps, pure_s) for pure_s in pure_ss])
    return np.asarray(pure_ss[int(np.argmax(values >= values.max() - 1e-12))])


def evaluate_fixed(
    allocation_s: ArrayLike, counts: ArrayLike, runs: ArrayLike, names: Sequence[str] | None = None
) -> Evaluation:
    """Unbiased evaluation of a given allocation; its samples are drawn in index order."""
    counts_ps, runs_ps = check_counts(counts, runs, names)
    steps = np.repeat(np.arange(counts_ps.shape[1]), np.asarray(allocation_s))
    failure_jp = unbiased_failure(counts_ps, runs_ps, nested(steps, counts_ps.shape[1]), names)
    return Evaluation(1 - failure_jp[-1], float(failure_jp[:-1].mean(axis=1).sum()))


def oracle_pure(counts: ArrayLike, runs: ArrayLike, budget: float, cost: ArrayLike | None = None) -> Ints:
    """(S,) allocation of the whole budget to the configuration that is best on these (test) problems."""
    counts_ps, runs_ps = check_counts(counts, runs)
    pure_ss = pure_allocations(budget, check_cost(cost, [str(s) for s in range(counts_ps.shape[1])]))
    values = 1 - unbiased_failure(counts_ps, runs_ps, pure_ss).mean(axis=1)
    return np.asarray(pure_ss[int(np.argmax(values >= values.max() - 1e-12))])


def uniform_mixed(counts: ArrayLike, runs: ArrayLike, budget: int) -> Evaluation:
    """Evaluation of `budget` samples whose configurations are drawn uniformly, in expectation."""
    counts_ps, runs_ps = check_counts(counts, runs)
    return Evaluation(1 - uniform_failure(counts_ps, runs_ps, budget), None)


@dataclass(frozen=True)
class CrossValidation:
    """Held-out evaluations of all problems, each by an allocation that was fitted without it.

    Attributes:
        allocations: one per fold.
        folds: (P,) fold in which each problem was held out.
        mixed, pure: evaluations of the allocation and of train-selected pure, (P,) in the problems' order.
    """

    allocations: tuple[Allocation, ...]
    folds: Ints
    mixed: Evaluation
    pure: Evaluation


def cross_validate(
    counts: ArrayLike,
    runs: ArrayLike,
    budget: float,
    folds: int,
    generator: np.random.Generator,
    *,
    cost: ArrayLike | None = None,
    method: Method = "auto",
    configurations: Sequence[str] | None = None,
) -> CrossValidation:
    """K-fold evaluation over problems.

    Args:
        counts, runs, budget, cost, method, configurations: as in `allocate`.
        folds: number of folds, 2 to P.
        generator: assigns problems to folds; a source of random starts for `hill_climb`.

    Raises:
        ConfigError: fewer than 2 folds or more folds than problems.
        DataError, BudgetError: as in `allocate` and `Allocation.evaluate`.
    """
    counts_ps, runs_ps = check_counts(counts, runs, configurations)
    problems = counts_ps.shape[0]
    if not 2 <= folds <= problems:
        raise ConfigError(f"{problems} problems can be split into 2 to {problems} folds; given {folds}.")
    fold_p = generator.permutation(np.arange(problems) % folds)
    solved = np.empty((2, problems))
    draws = np.zeros(2)
    allocations = []
    for fold in range(folds):
        held = fold_p == fold
        start = generator if method == "hill_climb" else None
        fitted = allocate(
            counts_ps[~held],
            runs_ps[~held],
            budget,
            cost,
            method,
            configurations=configurations,
            generator=start,
        )
        pure_s = train_selected_pure(counts_ps[~held], runs_ps[~held], budget, cost)
        mixed = fitted.evaluate(counts_ps[held], runs_ps[held])
        pure = evaluate_fixed(pure_s, counts_ps[held], runs_ps[held], configurations)
        solved[:, held] = mixed.per_problem, pure.per_problem
        draws += np.array([mixed.expected_samples, pure.expected_samples]) * held.mean()
        allocations.append(fitted)
    return CrossValidation(
        tuple(allocations),
        np.asarray(fold_p),
        Evaluation(solved[0], float(draws[0])),
        Evaluation(solved[1], float(draws[1])),
    )


def half_split(problems: int, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """Indices of a random half of the problems for fitting and of the rest for testing, each sorted.

    Raises:
        ConfigError: fewer than 2 problems.
    """
    if problems < 2:
        raise ConfigError(f"a half split needs at least 2 problems; given {problems}.")
    order = generator.permutation(problems)
    return np.sort(order[: problems // 2]), np.sort(order[problems // 2 :])
