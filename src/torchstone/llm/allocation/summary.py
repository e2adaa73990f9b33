"""What a user asks of a count table: the split for a budget, and an honest account of what it is worth.

Fitting and testing never share a problem: by a split column, a random half, or K folds. With folds the
allocation that is handed out is fitted on all problems, and the held-out values tell what such a fit is
worth on new ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchstone.errors import ConfigError, DataError
from torchstone.llm.allocation.baselines import (
    cross_validate,
    evaluate_fixed,
    half_split,
    train_selected_pure,
    uniform_mixed,
)
from torchstone.llm.allocation.objectives import Ints
from torchstone.llm.allocation.policy import Allocation, Evaluation, Method, allocate, compare
from torchstone.llm.allocation.table import CountTable
from torchstone.stats.estimate import Estimate

_FOLDS = re.compile(r"kfold:(\d{1,6})")


@dataclass(frozen=True)
class Request:
    """What is asked: budget, costs, method, and how problems are split."""

    budget: float
    cost: Sequence[float] | None = None
    method: Method = "auto"
    split: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class BudgetRow:
    """One budget: what allocation, best single configuration and uniform mixing solve on held-out problems.

    Attributes:
        budget: in units of cost.
        gap: certificate, distance of the train value from the best possible one (the worst fold's).
        mixed, pure: held-out evaluations; `uniform` is None with unequal costs or too few runs, as is `pure`.
        interval: of the mixed policy.
        gain: mixed - pure, paired by problem.
    """

    budget: float
    gap: float
    mixed: Evaluation
    interval: Estimate
    pure: Evaluation | None
    uniform: Evaluation | None
    gain: Estimate | None


@dataclass(frozen=True)
class Summary:
    """The answer: the allocation to use, its held-out worth per budget, and what each configuration adds.

    Attributes:
        allocation: for the asked budget.
        rows: budgets 1, 2, 4, … and the asked one.
        adds: (S, S) problems that column j solved at least once, row i never; diagonal: solved by i at all.
        tested: how the held-out values were made.
        warnings: sentences that belong beside every number.
    """

    allocation: Allocation
    rows: tuple[BudgetRow, ...]
    adds: Ints
    tested: str
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        found = self.allocation
        return {
            "budget": found.budget,
            "method": found.method,
            "tested": self.tested,
            "warnings": list(self.warnings),
            "allocation": {name: int(n) for name, n in zip(found.configurations, found.counts, strict=True)},
            "cost": {name: float(c) for name, c in zip(found.configurations, found.cost, strict=True)},
            "order": [found.configurations[s] for s in found.order],
            "train_value": found.train_value,
            "upper_bound": found.upper_bound,
            "gap": found.gap,
            "expected_samples": found.expected_samples,
            "curve": [row_data(row) for row in self.rows],
            "adds": {name: [int(v) for v in row] for name, row in zip(found.configurations, self.adds, strict=True)},
        }


def summarise(table: CountTable, request: Request) -> Summary:
    """Fit and evaluate at the asked budget and the powers of two below it.

    Raises:
        DataError: the table cannot be used, or has too few runs for the budget.
        ConfigError, BudgetError: the request cannot be met.
    """
    generator = np.random.default_rng(request.seed)
    train, test, folds, tested = _split(table, request.split, generator)
    warnings = []
    if request.split not in ("half",) and folds is None and (overlap := table.overlap()):
        warnings.append(overlap)
    start = np.random.default_rng(request.seed) if request.method == "hill_climb" else None
    found = allocate(
        train.counts, train.runs, request.budget, request.cost, request.method,
        configurations=table.configurations, generator=start,
    )  # fmt: skip
    rows = tuple(_row(train, test, folds, budget, request) for budget in _budgets(request))
    scarce = int(table.runs.min())
    if scarce < 3:
        warnings.append(
            f"some configurations have only {scarce} run on a problem: one success there counts as certain "
            "success, so the fit is misled easily. Add runs."
        )
    return Summary(found, rows, added_problems(table), tested, tuple(warnings))


def split_column(split: str | None) -> str | None:
    """The column that a split names; None for `half`, `kfold:K` and no split."""
    return None if split is None or split == "half" or _FOLDS.fullmatch(split) else split


def added_problems(table: CountTable) -> Ints:
    """(S, S) problems that column j solved at least once and row i never; diagonal: solved by i at all."""
    solved_ps = table.counts > 0
    adds_ss = (~solved_ps).T.astype(np.int64) @ solved_ps.astype(np.int64)
    np.fill_diagonal(adds_ss, solved_ps.sum(axis=0))
    return adds_ss


def row_data(row: BudgetRow) -> dict[str, float | None]:
    """One row as plain data; None where a value does not exist."""
    gain = row.gain
    return {
        "budget": row.budget,
        "mixed": row.mixed.value,
        "mixed_low": row.interval.low,
        "mixed_high": row.interval.high,
        "pure": row.pure.value if row.pure else None,
        "uniform": row.uniform.value if row.uniform else None,
        "gain": gain.effect if gain else None,
        "gain_low": gain.low if gain else None,
        "gain_high": gain.high if gain else None,
        "expected_samples": row.mixed.expected_samples,
        "gap": row.gap,
    }


def _split(
    table: CountTable, split: str | None, generator: np.random.Generator
) -> tuple[CountTable, CountTable, int | None, str]:
    """Training part, test part, number of folds (None: a fixed split), and a sentence."""
    problems = len(table.problems)
    folds = _FOLDS.fullmatch(split or "")
    by_column = split_column(split) is not None or (split is None and bool(table.split))
    copies = problems - len(set(table.problems))
    if not by_column and copies:
        raise DataError(
            f"{copies} problems of {table.source} have a row in both parts of its split; a half split or "
            "folds would put copies of one problem on both sides. Keep one row per problem."
        )
    if split == "half":
        train, test = half_split(problems, generator)
        text = f"fitted on a random half ({train.size} problems), tested on the other ({test.size})"
        return table.rows(train), table.rows(test), None, text
    if folds or (split is None and not table.split):
        count = int(folds[1]) if folds else min(5, problems)
        return table, table, count, f"{count} folds over {problems} problems, each tested by a fit without it"
    if not table.split:
        raise ConfigError(f"unknown split {split!r}; use a column of the table, kfold:K or half.")
    train_part, test_part = table.part("train"), table.part("test")
    fitted, tested = len(train_part.problems), len(test_part.problems)
    return train_part, test_part, None, f"fitted on {fitted} problems, tested on {tested} (the table's split)"


def _budgets(request: Request) -> list[float]:
    cheapest = min(request.cost) if request.cost is not None else 1.0
    powers = [cheapest * 2.0**k for k in range(40) if cheapest * 2.0**k < request.budget]
    return [*powers, float(request.budget)]


def _row(train: CountTable, test: CountTable, folds: int | None, budget: float, request: Request) -> BudgetRow:
    generator = np.random.default_rng([request.seed, 1])
    cost, method, names = request.cost, request.method, train.configurations
    pure: Evaluation | None
    if folds is not None:
        crossed = cross_validate(
            train.counts, train.runs, budget, folds, generator, cost=cost, method=method, configurations=names
        )
        gap = max(fitted.gap for fitted in crossed.allocations)
        mixed, pure = crossed.mixed, crossed.pure
    else:
        start = generator if method == "hill_climb" else None
        fitted = allocate(train.counts, train.runs, budget, cost, method, configurations=names, generator=start)
        gap, mixed = fitted.gap, fitted.evaluate(test.counts, test.runs)
        chosen = train_selected_pure(train.counts, train.runs, budget, cost)
        pure = _where_possible(lambda: evaluate_fixed(chosen, test.counts, test.runs, names))
    same = cost is None or len(set(cost)) == 1
    draws = int(budget // (cost[0] if cost is not None else 1) + 1e-9)
    uniform = _where_possible(lambda: uniform_mixed(test.counts, test.runs, draws)) if same else None
    gain = compare(mixed, pure, generator) if pure else None
    return BudgetRow(budget, gap, mixed, mixed.interval(generator), pure, uniform, gain)


def _where_possible(evaluate: Callable[[], Evaluation]) -> Evaluation | None:
    """The evaluation of a baseline, or None where the table has too few runs for it."""
    try:
        return evaluate()
    except DataError:
        return None
