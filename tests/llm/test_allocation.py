"""Sample allocation: optimality, certificate, ties, costs, order, unbiasedness, splits, refusals."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchstone.errors import BudgetError, ConfigError, DataError
from torchstone.llm.allocation import (
    OverlapWarning,
    allocate,
    compare,
    cross_validate,
    evaluate_fixed,
    half_split,
    oracle_pure,
    pass_at_k,
    train_selected_pure,
    uniform_mixed,
)
from torchstone.llm.allocation.greedy import exchange, greedy_path, nested
from torchstone.llm.allocation.objectives import failure, train_value, uniform_failure
from torchstone.llm.allocation.relaxation import upper_bound


def population(seed: int, problems: int = 12, configurations: int = 3, runs: int = 20) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rates = rng.beta(0.4, 1.2, (problems, configurations))
    return rng.binomial(runs, rates)


def brute_force(rates: np.ndarray, budget: int) -> float:
    choices = itertools.product(range(budget + 1), repeat=rates.shape[1])
    return max(train_value(rates, choice) for choice in choices if sum(choice) == budget)


class TestPassAtK:
    @pytest.mark.parametrize(("runs", "successes", "k"), [(6, 2, 3), (5, 0, 5), (4, 4, 1), (7, 3, 0)])
    def test_is_the_share_of_subsets_with_a_success(self, runs: int, successes: int, k: int) -> None:
        outcomes = [True] * successes + [False] * (runs - successes)
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(runs, successes, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)

    def test_large_numbers(self) -> None:
        assert pass_at_k(10**6, 1, 500_000) == pytest.approx(0.5, rel=1e-9)

    @pytest.mark.parametrize(("runs", "successes", "k"), [(3, 0, 4), (0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, -1)])
    def test_refuses_what_has_no_unbiased_estimate(self, runs: int, successes: int, k: int) -> None:
        with pytest.raises(DataError):
            pass_at_k(runs, successes, k)


class TestOptimality:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4))
    def test_exact_is_brute_force_and_the_bound_lies_above(self, seed: int, budget: int, count: int) -> None:
        counts = population(seed, configurations=count)
        if not counts.any():
            return
        best = brute_force(counts / 20, budget)
        found = allocate(counts, 20, budget, method="exact")
        assert found.train_value == pytest.approx(best, abs=1e-12)
        assert found.upper_bound >= best - 1e-12
        greedy = allocate(counts, 20, budget, method="greedy").train_value
        swapped = allocate(counts, 20, budget, method="greedy+swap").train_value
        assert (1 - 1 / np.e) * best - 1e-12 <= greedy <= swapped + 1e-12 <= best + 2e-12

    def test_exchange_repairs_a_bad_start(self) -> None:
        rates = population(3) / 20
        start = np.array([12, 0, 0])
        found = exchange(rates, start, 12, np.ones(3))
        assert found.sum() == 12
        assert train_value(rates, found) == pytest.approx(allocate(population(3), 20, 12, method="exact").train_value)

    @pytest.mark.parametrize("budget", [1, 7, 100])
    def test_curve_is_nested_and_monotone(self, budget: int) -> None:
        found = allocate(population(4), 20, budget, method="greedy")
        assert found.curve.steps.size == budget
        assert (np.diff(found.curve.value) >= -1e-15).all()
        table = found.curve.allocations(3)
        assert (table[-1] == found.counts).all()
        for j in (0, budget // 2, budget):
            assert train_value(population(4) / 20, table[j]) == pytest.approx(found.curve.value[j], abs=1e-12)

    def test_ties_go_to_the_lowest_index(self) -> None:
        column = population(5, configurations=1)
        counts = np.concatenate([column * 0, column, column], axis=1)
        found = allocate(counts, 20, 6, method="greedy")
        assert found.counts[0] == 0 and found.counts[1] > 0
        assert allocate(counts, 20, 6).counts.tolist() == allocate(counts, 20, 6).counts.tolist()

    def test_sure_success_counts_as_sure(self) -> None:
        found = allocate([[1, 0], [0, 1]], 1, 2)
        assert found.counts.tolist() == [1, 1]
        assert found.train_value == 1.0 and found.gap == pytest.approx(0.0, abs=1e-9)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10**6))
    def test_certificate_is_tight_on_large_budgets(self, seed: int) -> None:
        counts = population(seed, problems=30, configurations=6)
        found = allocate(counts, 20, 64, method="greedy+swap")
        assert 0 <= found.gap < 2e-3

    def test_bound_is_sound_from_any_scale(self) -> None:
        rates = population(8, configurations=5) / 20
        for budget in (0.5, 3, 1000):
            bound = upper_bound(rates, budget, np.ones(5))
            points = np.random.default_rng(0).dirichlet(np.ones(5), 500) * budget
            assert bound >= max(1 - failure(rates, x).mean() for x in points) - 1e-12

    def test_hill_climb_from_a_random_start(self) -> None:
        counts = population(9)
        found = allocate(counts, 20, 10, method="hill_climb", generator=np.random.default_rng(0))
        exact = allocate(counts, 20, 10, method="exact")
        assert found.total == 10
        assert found.train_value <= exact.train_value + 1e-12
        again = allocate(counts, 20, 10, method="hill_climb", generator=np.random.default_rng(0))
        assert found.counts.tolist() == again.counts.tolist()


class TestCosts:
    COST = np.array([1.0, 2.5, 0.3])

    @pytest.mark.parametrize("method", ["greedy", "greedy+swap", "exact", "auto"])
    def test_budget_is_kept(self, method: str) -> None:
        found = allocate(population(1), 20, 4.0, self.COST, method)  # type: ignore[arg-type]
        assert found.counts @ self.COST <= 4.0 + 1e-9
        assert found.counts.any()
        assert found.upper_bound >= found.train_value - 1e-12

    def test_exact_with_costs_is_brute_force(self) -> None:
        counts = population(2)
        rates = counts / 20
        choices = [c for c in itertools.product(range(14), repeat=3) if np.dot(c, self.COST) <= 4.0 + 1e-9]
        best = max(train_value(rates, choice) for choice in choices)
        assert allocate(counts, 20, 4.0, self.COST, "exact").train_value == pytest.approx(best, abs=1e-12)

    def test_a_cheap_sample_does_not_block_the_good_one(self) -> None:
        """Gain per cost alone takes the cheap configuration first and can then not afford the good one."""
        counts = np.array([[1, 0], [0, 19], [0, 19], [0, 19]])
        found = allocate(counts, 20, 1.0, [0.01, 1.0], "greedy")
        assert found.counts.tolist() == [0, 1]

    def test_equal_costs_only_scale_the_budget(self) -> None:
        counts = population(3)
        scaled = allocate(counts, 20, 6 * 0.1, [0.1] * 3, "greedy")
        assert scaled.counts.tolist() == allocate(counts, 20, 6, method="greedy").counts.tolist()

    @pytest.mark.parametrize("cost", [[1, 2], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1]])
    def test_bad_costs(self, cost: list[float]) -> None:
        with pytest.raises(ConfigError, match="cost"):
            allocate(population(1), 20, 4, cost)


class TestOrder:
    def test_order_spends_the_counts_best_first(self) -> None:
        counts = population(6)
        found = allocate(counts, 20, 9)
        assert np.bincount(found.order, minlength=3).tolist() == found.counts.tolist()
        assert found.order[0] in np.flatnonzero(counts.mean(axis=0) >= counts[:, found.counts > 0].mean(axis=0).max())

    def test_expected_samples_is_the_simulated_number_of_draws(self) -> None:
        counts = population(7)
        found = allocate(counts, 20, 8)
        rng = np.random.default_rng(0)
        success = rng.random((4000, counts.shape[0], 8)) < (counts / 20)[:, found.order]
        first = np.where(success.any(axis=2), success.argmax(axis=2) + 1, 8)
        assert found.expected_samples == pytest.approx(first.mean(), abs=0.03)

    def test_another_order_draws_no_fewer(self) -> None:
        counts = population(7)
        found = allocate(counts, 20, 8)
        reverse = nested(found.order[::-1].copy(), 3)[:-1]
        assert found.expected_samples <= sum(failure(counts / 20, row).mean() for row in reverse) + 1e-12


class TestEvaluation:
    def test_unbiased(self) -> None:
        """Over many tables drawn from known rates the mean estimate is the true pass@C."""
        rng = np.random.default_rng(1)
        rates = rng.beta(0.5, 2, (8, 3))
        allocation = np.array([2, 0, 3])
        values = [evaluate_fixed(allocation, rng.binomial(5, rates), 5).value for _ in range(4000)]
        assert np.mean(values) == pytest.approx(train_value(rates, allocation), abs=0.004)

    def test_plug_in_is_biased_low_for_rare_successes(self) -> None:
        rng = np.random.default_rng(2)
        rates = np.full((8, 1), 0.1)
        values = [train_value(rng.binomial(5, rates) / 5, [5]) for _ in range(2000)]
        assert np.mean(values) < train_value(rates, [5]) - 0.05

    def test_more_samples_than_runs(self) -> None:
        found = allocate(population(1), 20, 30, configurations=["a", "b", "c"])
        with pytest.raises(DataError, match=r"configuration [abc] gets \d+ samples .* only 4 runs"):
            found.evaluate(population(2, runs=4), 4)

    def test_runs_may_differ_by_cell(self) -> None:
        runs = np.array([[4, 8], [8, 4]])
        value = evaluate_fixed([2, 2], [[2, 0], [0, 1]], runs).per_problem
        assert value == pytest.approx([pass_at_k(4, 2, 2), pass_at_k(4, 1, 2)])

    def test_curve_ends_at_the_value_of_the_greedy_allocation(self) -> None:
        found = allocate(population(1), 20, 10, method="greedy")
        curve = found.evaluate_curve(population(2), 20)
        assert curve.shape == (11, 12)
        assert curve[0].tolist() == [0.0] * 12
        assert curve[-1] == pytest.approx(found.evaluate(population(2), 20).per_problem, abs=1e-12)

    def test_in_sample_evaluation_warns_with_the_count(self) -> None:
        counts = population(1)
        found = allocate(counts, 20, 4)
        with pytest.warns(OverlapWarning, match="all 12 test problems"):
            found.evaluate(counts, 20)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.evaluate(population(2), 20)

    def test_other_configurations_are_refused(self) -> None:
        with pytest.raises(DataError, match="3 configurations"):
            allocate(population(1), 20, 4).evaluate(population(1, configurations=2), 20)

    def test_interval_and_comparison(self) -> None:
        train, test = population(1, 60), population(2, 60)
        mixed = allocate(train, 20, 8).evaluate(test, 20)
        pure = evaluate_fixed(train_selected_pure(train, 20, 8), test, 20)
        interval = mixed.interval(np.random.default_rng(0))
        assert interval.low < mixed.value < interval.high
        gain = compare(mixed, pure, np.random.default_rng(0))
        assert gain.effect == pytest.approx(mixed.value - pure.value)
        assert gain.low < gain.effect < gain.high
        assert compare(mixed, mixed, np.random.default_rng(0)).effect == 0.0


class TestBaselines:
    def test_uniform_is_the_mean_over_random_allocations(self) -> None:
        counts, rng = population(3), np.random.default_rng(0)
        draws = rng.multinomial(6, np.full(3, 1 / 3), 20_000)
        found, times = np.unique(draws, axis=0, return_counts=True)
        values = [evaluate_fixed(n, counts, 20).value for n in found]
        assert uniform_mixed(counts, 20, 6).value == pytest.approx(np.average(values, weights=times), abs=2e-3)

    def test_uniform_over_one_configuration_is_pure(self) -> None:
        counts = population(3, configurations=1)
        expected = evaluate_fixed([20], counts, 20).per_problem
        assert uniform_mixed(counts, 20, 20).per_problem == pytest.approx(expected, abs=1e-9)
        assert uniform_failure(counts, np.full_like(counts, 20), 0).tolist() == [1.0] * 12

    def test_uniform_needs_enough_runs(self) -> None:
        with pytest.raises(DataError, match="only 20 runs"):
            uniform_mixed(population(1), 20, 21)

    def test_pure_baselines(self) -> None:
        counts = np.array([[20, 0, 5], [20, 0, 5], [0, 20, 5], [0, 0, 5]])
        assert train_selected_pure(counts, 20, 1).tolist() == [1, 0, 0]
        assert train_selected_pure(counts, 20, 12).tolist() == [0, 0, 12]
        assert oracle_pure(counts, 20, 12).tolist() == [0, 0, 12]

    def test_cross_validation_never_tests_what_it_fitted(self) -> None:
        counts = population(4, problems=23)
        crossed = cross_validate(counts, 20, 5, 4, np.random.default_rng(0))
        assert sorted(np.bincount(crossed.folds)) == [5, 6, 6, 6]
        for fold, fitted in enumerate(crossed.allocations):
            held = crossed.folds == fold
            again = allocate(counts[~held], 20, 5)
            assert fitted.counts.tolist() == again.counts.tolist()
            assert crossed.mixed.per_problem[held] == pytest.approx(again.evaluate(counts[held], 20).per_problem)

    def test_cross_validation_refuses_bad_folds(self) -> None:
        for folds in (1, 13):
            with pytest.raises(ConfigError, match="folds"):
                cross_validate(population(1), 20, 5, folds, np.random.default_rng(0))

    def test_half_split_is_a_partition(self) -> None:
        first, second = half_split(9, np.random.default_rng(0))
        assert sorted([*first, *second]) == list(range(9)) and first.size == 4
        with pytest.raises(ConfigError, match="at least 2"):
            half_split(1, np.random.default_rng(0))


class TestRefusals:
    def test_more_successes_than_runs_names_the_cell(self) -> None:
        with pytest.raises(DataError, match="problem 2, configuration b: 9 successes of 8 runs"):
            allocate([[1, 2], [3, 9]], 8, 2, configurations=["a", "b"])

    @pytest.mark.parametrize("counts", [[[-1, 2]], [[0.5, 1]], [[float("nan"), 1]], [], [[]], [1, 2], [["x", "y"]]])
    def test_unusable_counts(self, counts: list) -> None:
        with pytest.raises(DataError):
            allocate(counts, 8, 2)

    @pytest.mark.parametrize("runs", [0, [8, 0], [8, 8, 8], 2.5])
    def test_unusable_runs(self, runs: object) -> None:
        with pytest.raises(DataError, match="run"):
            allocate([[1, 2], [0, 1]], runs, 2)  # type: ignore[arg-type]

    def test_no_configuration_ever_succeeds(self) -> None:
        with pytest.raises(DataError, match="no configuration ever succeeds on the 3 training problems"):
            allocate(np.zeros((3, 2), dtype=int), 8, 2)

    @pytest.mark.parametrize("budget", [0, -1, 0.5, float("nan"), float("inf"), 1e9])
    def test_unusable_budgets(self, budget: float) -> None:
        with pytest.raises(BudgetError, match="budget"):
            allocate(population(1), 20, budget)

    def test_unknown_or_unfit_methods(self) -> None:
        with pytest.raises(ConfigError, match="unknown allocation method"):
            allocate(population(1), 20, 3, method="magic")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="generator"):
            allocate(population(1), 20, 3, method="hill_climb")
        with pytest.raises(ConfigError, match="every sample costs 1"):
            allocate(population(1), 20, 3, [2, 1, 1], "hill_climb", generator=np.random.default_rng(0))
        with pytest.raises(BudgetError, match="too many allocations"):
            allocate(population(1, configurations=12), 20, 40, method="exact")

    def test_names_must_differ(self) -> None:
        with pytest.raises(ConfigError, match="different names"):
            allocate(population(1), 20, 3, configurations=["a", "a", "b"])


def test_greedy_path_stops_when_nothing_fits() -> None:
    path = greedy_path(population(1) / 20, 2.0, np.array([0.9, 1.2, 5.0]))
    assert path.cost[-1] <= 2.0 and path.steps.size >= 1 and 2 not in path.steps
