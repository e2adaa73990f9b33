"""`allocate`: how to split a sample budget over configurations, and what the split is worth on new problems.

    allocation = allocate(train_counts, runs=300, budget=64)
    allocation.counts                          # samples per configuration
    allocation.train_value, allocation.gap     # "within 0.00003 of the best possible split"
    allocation.evaluate(test_counts, 300)      # unbiased pass@64 on held-out problems

The train value was maximised, so it is optimistic; report `evaluate` on problems that were not used for
fitting.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from torchstone.errors import BudgetError, ConfigError, DataError
from torchstone.llm.allocation.exact import exact
from torchstone.llm.allocation.greedy import (
    Path,
    affordable,
    exchange,
    greedy_path,
    guarded,
    nested,
    sample_order,
)
from torchstone.llm.allocation.hill_climb import hill_climb, random_start
from torchstone.llm.allocation.objectives import (
    Floats,
    Ints,
    check_counts,
    success_rates,
    train_value,
    unbiased_failure,
)
from torchstone.llm.allocation.relaxation import upper_bound
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.contrasts import paired
from torchstone.stats.estimate import Estimate

Method = Literal["auto", "greedy", "greedy+swap", "exact", "hill_climb"]
MOST_SAMPLES = 100_000


class OverlapWarning(UserWarning):
    """The problems used for fitting and for testing overlap, so the test value is optimistic."""


@dataclass(frozen=True)
class Evaluation:
    """Unbiased estimate of what an allocation solves.

    Attributes:
        per_problem: (P,) estimated probability that the problem is solved.
        expected_samples: mean number of samples drawn per problem when a verifier stops at the first success;
            None where the samples have no fixed order.
    """

    per_problem: Floats
    expected_samples: float | None

    @property
    def value(self) -> float:
        """Mean over problems: pass@C of the mixed policy."""
        return float(self.per_problem.mean())

    def interval(self, generator: np.random.Generator, level: float = 0.95) -> Estimate:
        """Bootstrap interval of `value` over problems."""
        return clustered_estimate(self.per_problem, None, generator, level=level)


def compare(one: Evaluation, other: Evaluation, generator: np.random.Generator, level: float = 0.95) -> Estimate:
    """one - other with a bootstrap interval over problems; both must be evaluated on the same problems."""
    contrasts = paired(one.per_problem, other.per_problem)
    return clustered_estimate(contrasts.values, None, generator, level=level, resolution=contrasts.resolution)


@dataclass(frozen=True)
class Allocation:
    """A split of the budget over configurations.

    Attributes:
        configurations: S names.
        counts: (S,) samples of each configuration.
        order: configuration indices in the order in which to draw them (largest gain first).
        train_value: plug-in pass probability on the problems used for fitting; optimistic.
        upper_bound: no allocation within the budget has a larger train value.
        curve: the greedy path: allocation and train value for every budget up to this one.
        expected_samples: mean draws per training problem when stopping at the first success.
        method: the method that was used (`auto` resolved).
        budget, cost: total budget and (S,) cost of one sample.
    """

    configurations: tuple[str, ...]
    counts: Ints
    order: Ints
    train_value: float
    upper_bound: float
    curve: Path
    expected_samples: float
    method: str
    budget: float
    cost: Floats
    train_counts: Ints = field(repr=False)

    @property
    def gap(self) -> float:
        """The train value is within this of the best possible one."""
        return max(0.0, self.upper_bound - self.train_value)

    @property
    def total(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    def evaluate(self, test_counts: ArrayLike, test_runs: ArrayLike) -> Evaluation:
        """Unbiased pass probability on test problems.

        Args:
            test_counts: (P', S) successes on problems that were not used for fitting.
            test_runs: trials, shaped as in `allocate`.

        Raises:
            DataError: bad counts, other configurations, or more samples than runs.

        Warns:
            OverlapWarning: the test counts are the training counts.
        """
        counts_ps, runs_ps = self._test(test_counts, test_runs)
        steps_js = nested(self.order, self.counts.size)
        failure_jp = unbiased_failure(counts_ps, runs_ps, steps_js, self.configurations)
        return Evaluation(1 - failure_jp[-1], float(failure_jp[:-1].mean(axis=1).sum()))

    def evaluate_curve(self, test_counts: ArrayLike, test_runs: ArrayLike) -> Floats:
        """(J + 1, P') unbiased pass probability after 0, 1, … all samples of the greedy path."""
        counts_ps, runs_ps = self._test(test_counts, test_runs)
        return 1 - unbiased_failure(counts_ps, runs_ps, self.curve.allocations(self.counts.size), self.configurations)

    def _test(self, test_counts: ArrayLike, test_runs: ArrayLike) -> tuple[Ints, Ints]:
        counts_ps, runs_ps = check_counts(test_counts, test_runs, self.configurations)
        if counts_ps.shape[1] != len(self.configurations):
            raise DataError(
                f"the allocation has {len(self.configurations)} configurations, the test table "
                f"{counts_ps.shape[1]}; give the same columns in the same order."
            )
        if counts_ps.shape == self.train_counts.shape and (counts_ps == self.train_counts).all():
            warnings.warn(
                f"all {counts_ps.shape[0]} test problems have the counts of the training problems: this "
                "value is in-sample, hence optimistic. Split the problems, or use cross_validate.",
                OverlapWarning,
                stacklevel=3,
            )
        return counts_ps, runs_ps


def allocate(
    counts: ArrayLike,
    runs: ArrayLike,
    budget: float,
    cost: ArrayLike | None = None,
    method: Method = "auto",
    *,
    configurations: Sequence[str] | None = None,
    generator: np.random.Generator | None = None,
) -> Allocation:
    """Split a budget of samples over configurations so that most training problems are solved.

    Args:
        counts: (P, S) successes of configuration s on problem p.
        runs: trials: one number, (S,) or (P, S).
        budget: samples per problem; in units of `cost` where that is given.
        cost: (S,) cost of one sample; None: 1 each.
        method: `auto` enumerates where that is cheap, else takes `greedy+swap`; `greedy`, `greedy+swap`,
            `exact`; `hill_climb` is the authors' procedure (unit costs only).
        configurations: names; numbered if None.
        generator: random start of `hill_climb`; only for that method.

    Raises:
        DataError: bad counts, or no configuration ever succeeds.
        BudgetError: a budget that pays for no sample, or for more than 100,000.
        ConfigError: unknown method, bad costs, a method that does not fit.
    """
    counts_ps, runs_ps = check_counts(counts, runs, configurations)
    names = _names(configurations, counts_ps.shape[1])
    cost_s = check_cost(cost, names)
    _check_request(counts_ps, budget, cost_s, method, generator)
    rates_ps = success_rates(counts_ps, runs_ps)
    path = greedy_path(rates_ps, budget, cost_s)
    chosen_s, used = _choose(rates_ps, path, budget, cost_s, method, generator)
    order, draws = sample_order(rates_ps, chosen_s, cost_s)
    return Allocation(
        configurations=names,
        counts=chosen_s,
        order=order,
        train_value=train_value(rates_ps, chosen_s),
        upper_bound=upper_bound(rates_ps, budget, cost_s),
        curve=path,
        expected_samples=draws,
        method=used,
        budget=float(budget),
        cost=cost_s,
        train_counts=counts_ps,
    )


def check_cost(cost: ArrayLike | None, names: Sequence[str]) -> Floats:
    """(S,) costs, ones where None; raises ConfigError for a wrong number of them or one not above 0."""
    if cost is None:
        return np.ones(len(names))
    cost_s = np.asarray(cost, dtype=np.float64)
    if cost_s.shape != (len(names),):
        raise ConfigError(
            f"{len(names)} configurations need {len(names)} costs; given shape {cost_s.shape}. "
            f"Configurations: {', '.join(names[:12])}."
        )
    if not (np.isfinite(cost_s) & (cost_s > 0)).all():
        worst = int(np.argmin(np.where(np.isfinite(cost_s), cost_s, -np.inf)))
        raise ConfigError(f"costs must be finite and above 0; {names[worst]} has {cost_s[worst]:g}.")
    return cost_s


def _names(configurations: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = tuple(configurations) if configurations is not None else tuple(str(s) for s in range(count))
    if len(names) != count or len(set(names)) != count:
        raise ConfigError(f"{count} configurations need {count} different names; given {len(set(names))}.")
    return names


def _check_request(
    counts_ps: Ints, budget: float, cost_s: Floats, method: str, generator: np.random.Generator | None
) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"unknown allocation method {method!r}; allowed: {', '.join(get_args(Method))}.")
    if (method == "hill_climb") != (generator is not None):
        raise ConfigError("hill_climb needs a generator for its random start; the other methods take none.")
    if method == "hill_climb" and not (cost_s == 1).all():
        raise ConfigError("hill_climb is the published procedure, where every sample costs 1; use 'auto' with costs.")
    if not (np.isfinite(budget) and budget >= cost_s.min()):
        raise BudgetError(f"budget {budget!r} pays for no sample; the cheapest costs {cost_s.min():g}.")
    if affordable(budget, cost_s).max() > MOST_SAMPLES:
        raise BudgetError(f"budget {budget:g} pays for more than {MOST_SAMPLES} samples per problem; lower it.")
    if not counts_ps.any():
        raise DataError(
            f"no configuration ever succeeds on the {counts_ps.shape[0]} training problems, so there is "
            "nothing to choose by. Add runs, easier problems or better configurations."
        )


def _choose(
    rates_ps: Floats,
    path: Path,
    budget: float,
    cost_s: Floats,
    method: str,
    generator: np.random.Generator | None,
) -> tuple[Ints, str]:
    if generator is not None:
        start = random_start(int(affordable(budget, cost_s)[0]), cost_s.size, generator)
        return hill_climb(rates_ps, start), method
    if method in ("auto", "exact"):
        found_s = exact(rates_ps, budget, cost_s)
        if found_s is not None:
            return found_s, "exact"
        if method == "exact":
            raise BudgetError(
                f"budget {budget:g} over {cost_s.size} configurations has too many allocations to enumerate "
                "(the limit is 100,000); use method 'greedy+swap', whose certificate says how close it is."
            )
    if method == "greedy":
        same = bool((cost_s == cost_s[0]).all())
        return (path.allocations(cost_s.size)[-1] if same else guarded(rates_ps, path, budget, cost_s)), method
    return exchange(rates_ps, guarded(rates_ps, path, budget, cost_s), budget, cost_s), "greedy+swap"
