"""Calibration by simulation: identical arms hold in at most 5 %, 95 % intervals cover 93 to 97 %.

Everything goes through the functions that verdicts use; generators are fixed. The wider tables are those of
benchmarks/calibration.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from torchstone.llm.allocation.populations import generate_table
from torchstone.llm.allocation.trial import random_halves, spend
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.contrasts import paired, paired_items
from torchstone.stats.decision import decide
from torchstone.stats.estimate import t_estimate
from torchstone.stats.sequential import SequentialDesign, declared_looks


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_t_interval_over_seeds(n: int, margin: float) -> None:
    """10,000 studies whose true contrast equals the margin."""
    draws = np.random.default_rng([n, 1]).normal(margin, 0.7, (10_000, n))
    statuses = np.zeros(2)
    covered = 0
    for values in draws:
        estimate = t_estimate(values, margin=margin)
        covered += estimate.low <= margin <= estimate.high
        status = decide(estimate, margin=margin, direction="greater").status
        statuses += [status == "holds", status == "fails"]
    assert 0.93 <= covered / len(draws) <= 0.97
    assert (statuses / len(draws) <= 0.03).all()


@pytest.mark.parametrize("n", [3, 5, 10])
def test_identical_arms_on_a_coarse_grid(n: int) -> None:
    """Accuracies on 50 questions tie often; ties must not decide more than 5 % of identical arms."""
    rng = np.random.default_rng([n, 2])
    arm, baseline = rng.binomial(50, 0.9, (2, 4_000, n)) / 50
    held = sum(
        decide(t_estimate(c.values, resolution=c.resolution)).status == "holds"
        for c in (paired(a, b) for a, b in zip(arm, baseline, strict=True))
    )
    assert held / 4_000 <= 0.05


@pytest.mark.parametrize("spending", ["linear", "obrien-fleming"])
def test_sequential_rule_at_every_look(spending: str) -> None:
    """Error of holds and of fails up to every look, and joint coverage of the repeated intervals."""
    looks = declared_looks(3, 10)
    design = SequentialDesign(looks, spending=spending)  # type: ignore[arg-type]
    draws = np.random.default_rng(3).standard_normal((6_000, looks[-1]))
    held, failed, covered, usual = (np.zeros(len(looks)) for _ in range(4))
    for values in draws:
        first, valid = "", True
        for k, n in enumerate(looks):
            estimate = design.estimate(values[:n])
            status = decide(estimate).status
            first = first or ("" if status == "inconclusive" else status)
            valid = valid and estimate.low <= 0 <= estimate.high
            fixed = t_estimate(values[:n])
            usual[k] += fixed.low <= 0 <= fixed.high
            held[k] += first == "holds"
            failed[k] += first == "fails"
            covered[k] += valid
    for counts in (held, failed):
        assert (counts / len(draws) <= 0.03).all()
    assert ((usual / len(draws) >= 0.93) & (usual / len(draws) <= 0.97)).all()
    assert 0.93 <= covered[-1] / len(draws) <= 0.97
    assert (covered / len(draws) >= 0.93).all()


def test_looking_without_the_rule_is_what_it_prevents() -> None:
    """The usual interval at every look decides identical arms in clearly more than 5 %."""
    draws = np.random.default_rng(4).standard_normal((3_000, 10))
    decided = sum(
        any(decide(t_estimate(values[:n])).status != "inconclusive" for n in declared_looks(3, 10)) for values in draws
    )
    assert decided / len(draws) > 0.08


@pytest.mark.parametrize("clusters", [12, 30, 80])
def test_clustered_bootstrap(clusters: int) -> None:
    """Clusters of 1 to 8 items, a cluster effect plus item noise."""
    rng = np.random.default_rng([clusters, 5])
    trials, covered, held = 800, 0, 0
    for _ in range(trials):
        labels = np.repeat(np.arange(clusters), rng.integers(1, 9, clusters))
        values = rng.standard_normal(clusters)[labels] + rng.standard_normal(labels.size)
        estimate = clustered_estimate(values, labels, rng, resamples=400)
        covered += estimate.low <= 0 <= estimate.high
        held += decide(estimate).status == "holds"
    assert 0.93 <= covered / trials <= 0.975
    assert held / trials <= 0.05


def test_ignoring_clusters_is_what_the_bootstrap_prevents() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(200):
        labels = np.repeat(np.arange(30), 8)
        values = rng.standard_normal(30)[labels] + 0.5 * rng.standard_normal(labels.size)
        estimate = clustered_estimate(values, None, rng, resamples=200)
        covered += estimate.low <= 0 <= estimate.high
    assert covered / 200 < 0.75


def test_half_splits_of_one_set_of_problems() -> None:
    """The design of the allocation study: problems as clusters over overlapping half splits."""
    trials, held, covered = 100, 0, 0
    for trial in range(trials):
        table = generate_table("identical", 60, 4, 60, np.random.default_rng([7, trial]))
        mixed, pure = {}, {}
        for seed in range(8):
            train, test = random_halves(table, 1000 * trial + seed, runs=12)
            for policy, values in (("mixed", mixed), ("pure", pure)):
                solved = spend(policy, train, test, 6)[0].per_problem.tolist()
                values[seed] = dict(zip(test.problems, solved, strict=True))
        contrasts = paired_items(mixed, pure)
        estimate = clustered_estimate(contrasts.values, contrasts.clusters, np.random.default_rng(trial), resamples=400)
        held += decide(estimate).status == "holds"
        covered += estimate.low <= 0 <= estimate.high
    assert held / trials <= 0.05
    assert covered / trials >= 0.90
