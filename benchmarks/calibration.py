"""Calibration of the statistics, by simulation: do intervals cover as they say, do identical arms hold?

    python benchmarks/calibration.py            the tables of docs/statistics.md, in about two minutes
    python benchmarks/calibration.py --quick    the same with a tenth of the repetitions

Everything goes through the public functions that verdicts use. Every generator has a fixed seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from torchstone.llm.allocation.populations import generate_table
from torchstone.llm.allocation.trial import random_halves, spend
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.contrasts import paired_items
from torchstone.stats.decision import decide
from torchstone.stats.estimate import Estimate, t_estimate
from torchstone.stats.power import minimum_detectable_effect
from torchstone.stats.resampled import resampled_estimate
from torchstone.stats.sequential import SequentialDesign, declared_looks, simulate_statistics

Draw = Callable[[np.random.Generator, int], np.ndarray]

# Contrasts with true mean 0 and standard deviation about 1. Identical arms are exchangeable, so theirs are
# symmetric; the skewed shapes stand for different arms whose true contrast happens to equal the margin.
SHAPES: dict[str, Draw] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails (t, 3 df)": lambda rng, n: rng.standard_t(3, n) / 3**0.5,
    "skewed (exponential)": lambda rng, n: rng.exponential(1.0, n) - 1,
    "very skewed (log-normal)": lambda rng, n: (np.exp(rng.standard_normal(n)) - np.exp(0.5)) / 2.16,
    "accuracy on 100 questions": lambda rng, n: (rng.binomial(100, 0.7, n) - rng.binomial(100, 0.7, n)) / 6.5,
}


class Tally:
    """Counts what intervals did around a true value of 0."""

    def __init__(self) -> None:
        self.trials = self.covered = self.holds = self.fails = self.open = 0

    def add(self, estimate: Estimate, truth: float = 0.0) -> None:
        """Record one interval; one that does not exist is open."""
        self.trials += 1
        if estimate.low is None or estimate.high is None:
            self.open += 1
            return
        self.covered += estimate.low <= truth <= estimate.high
        status = decide(estimate, margin=truth, direction="greater").status
        self.holds += status == "holds"
        self.fails += status == "fails"

    def cells(self) -> str:
        """Coverage, holds, fails as a share of the intervals that exist, and the share without one."""
        real = max(1, self.trials - self.open)
        shares = [
            self.covered / real,
            self.holds / self.trials,
            self.fails / self.trials,
            self.open / self.trials,
        ]
        return " | ".join(f"{100 * share:.1f}" for share in shares)


def seeds_table(trials: int) -> None:
    """t interval at 3, 5 and 10 seeds."""
    print("\nt interval over seeds, true contrast at the margin")
    print("| contrasts | seeds | covers % | holds % | fails % | no interval % |")
    for name, draw in SHAPES.items():
        for n in (3, 5, 10):
            rng, tally = np.random.default_rng([n, 1]), Tally()
            for _ in range(trials):
                tally.add(t_estimate(draw(rng, n)))
            print(f"| {name} | {n} | {tally.cells()} |")


def looks_table(trials: int) -> None:
    """The sequential rule from 3 to 10 seeds: error and coverage after every look."""
    looks = declared_looks(3, 10)
    for spending in ("linear", "obrien-fleming"):
        design = SequentialDesign(looks, spending=spending)  # type: ignore[arg-type]
        bounds = ", ".join(f"{bound:.2f}" for bound in design.boundaries)
        print(f"\nSequential rule, looks at {looks}, {spending} spending, |t| above {bounds}")
        print("| contrasts | seeds | held % | failed % | usual interval covers % | all looks cover % |")
        for name, draw in SHAPES.items():
            rng = np.random.default_rng(3)
            holds, fails, usual, joint = (np.zeros(len(looks)) for _ in range(4))
            for _ in range(trials):
                values, stopped, valid = draw(rng, looks[-1]), "", True
                for k, n in enumerate(looks):
                    estimate = design.estimate(values[:n])
                    stopped = stopped or decide(estimate).status.replace("inconclusive", "")
                    holds[k] += stopped == "holds"
                    fails[k] += stopped == "fails"
                    fixed = t_estimate(values[:n])
                    usual[k] += fixed.low is not None and fixed.low <= 0 <= (fixed.high or 0)
                    valid = valid and (estimate.low is None or estimate.low <= 0 <= (estimate.high or 0))
                    joint[k] += valid
            for k, n in enumerate(looks):
                shares = " | ".join(f"{100 * a[k] / trials:.1f}" for a in (holds, fails, usual, joint))
                print(f"| {name} | {n} | {shares} |")


def naive_error() -> None:
    """What looking four times at the usual 5 % would do, and the price of the sequential rule."""
    looks = declared_looks(3, 10)
    rng = np.random.default_rng(4)
    naive = np.array([SequentialDesign((n,)).boundaries[0] for n in looks])
    crossed = (np.abs(simulate_statistics(looks, 400_000, rng)) > naive[:, None]).any(axis=0).mean()
    print(f"\nLooking at {looks} seeds with the usual interval decides identical arms in {100 * crossed:.1f} %.")
    print("| effect / sd | power 10 seeds | power linear | mean seeds | power obrien-fleming | mean seeds |")
    for distance in (0.5, 1.0, 1.5, 2.0, 4.0):
        cells = [f"{distance:g}"]
        fixed = simulate_statistics((10,), 200_000, np.random.default_rng(5), distance)[0]
        cells.append(f"{100 * (fixed > naive[-1]).mean():.0f} %")
        for spending in ("linear", "obrien-fleming"):
            bounds = np.array(SequentialDesign(looks, spending=spending).boundaries)  # type: ignore[arg-type]
            hit = simulate_statistics(looks, 200_000, np.random.default_rng(5), distance) > bounds[:, None]
            stop = np.where(hit.any(axis=0), hit.argmax(axis=0), len(looks) - 1)
            cells += [f"{100 * hit.any(axis=0).mean():.0f} %", f"{np.array(looks)[stop].mean():.1f}"]
        print(f"| {' | '.join(cells)} |")
    print("\n| seeds | minimum detectable effect / sd (80 % power) |")
    for n in (2, 3, 5, 8, 10, 20):
        print(f"| {n} | {minimum_detectable_effect(1.0, n):.2f} |")


def items_table(trials: int) -> None:
    """Clustered bootstrap: clusters of 1 to 8 items, cluster effect plus item noise."""
    print("\nClustered bootstrap over items (1 to 8 items a cluster), true contrast at the margin")
    print("| cluster effects | clusters | covers % | holds % | fails % | no interval % |")
    for name, draw in list(SHAPES.items())[:4]:
        for count in (10, 20, 50, 148):
            rng, tally = np.random.default_rng([count, 6]), Tally()
            for _ in range(trials):
                labels = np.repeat(np.arange(count), rng.integers(1, 9, count))
                values = draw(rng, count)[labels] + rng.standard_normal(labels.size)
                tally.add(clustered_estimate(values, labels, rng, resamples=1000))
            print(f"| {name} | {count} | {tally.cells()} |")
    for count in (10, 20, 50, 148):
        rng, tally = np.random.default_rng([count, 7]), Tally()
        for _ in range(trials):
            labels = np.repeat(np.arange(count), rng.integers(1, 9, count))
            chance = rng.beta(0.5, 0.5, count)[labels]
            values = (rng.random(labels.size) < chance) * 1.0 - (rng.random(labels.size) < chance)
            tally.add(clustered_estimate(values, labels, rng, resamples=1000))
        print(f"| right or wrong answers | {count} | {tally.cells()} |")


def half_splits_table(trials: int) -> None:
    """The design of the allocation study: 24 half splits of one set of problems, by either interval."""
    print("\nHalf splits of 148 problems, 10 configurations, 24 splits; mixed - pure, 16 samples")
    print("| population | runs fitted on | true gain | interval | covers % | above the truth % | above 0 % |")
    for kind, runs in (("identical", 16), ("dominated", None), ("complementary", 8), ("complementary", None)):
        found: dict[str, list[Estimate]] = {"problems": [], "corrected resampled t": []}
        for trial in range(trials):
            table = generate_table(kind, 148, 10, 300, np.random.default_rng([8, trial]))
            values: dict[str, dict[int, dict[str, float]]] = {"mixed": {}, "pure": {}}
            for seed in range(24):
                train, test = random_halves(table, 1000 * trial + seed, runs)
                for policy in values:
                    solved = spend(policy, train, test, 16)[0].per_problem.tolist()
                    values[policy][seed] = dict(zip(test.problems, solved, strict=True))
            pairs = paired_items(values["mixed"], values["pure"])
            found["problems"].append(clustered_estimate(pairs.values, pairs.clusters, np.random.default_rng(trial)))
            splits = pairs.values.reshape(24, -1).mean(axis=1)
            found["corrected resampled t"].append(resampled_estimate(splits, 0.5))
        truth = float(np.mean([estimate.effect for estimate in found["problems"]]))
        for name, estimates in found.items():
            ends = np.array([[estimate.low, estimate.high] for estimate in estimates], dtype=np.float64)
            covers = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
            shares = [100 * part.mean() for part in (covers, ends[:, 0] > truth, ends[:, 0] > 0)]
            cells = " | ".join(f"{share:.1f}" for share in shares)
            print(f"| {kind} | {runs or 300} | {truth:.4f} | {name} | {cells} |")


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    scale = 10 if parser.parse_args().quick else 1
    started = time.perf_counter()
    seeds_table(20_000 // scale)
    looks_table(20_000 // scale)
    naive_error()
    items_table(3_000 // scale)
    half_splits_table(200 // scale)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
