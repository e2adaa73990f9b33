"""Made-up populations with known structure, to see whether an allocation finds it.

    complementary   every problem has a kind and every configuration a kind it is good at: mixing must win
    dominated       one configuration is the best on every problem: mixing has nothing to gain
    identical       all configurations have the same success probability on every problem: every split of a
                    budget is worth the same, so any "gain" is noise

A share of the problems is solved by nothing, as in real benchmarks. The success probabilities are known, so
the true pass@C of any allocation is too (`train_value` with these rates).
"""

from __future__ import annotations

import numpy as np

from torchstone.errors import ConfigError
from torchstone.llm.allocation.objectives import Floats
from torchstone.llm.allocation.table import CountTable

KINDS = ("complementary", "dominated", "identical")
UNSOLVED = 0.2


def true_rates(kind: str, problems: int, configurations: int, generator: np.random.Generator) -> Floats:
    """(P, S) success probabilities of a population.

    Args:
        kind: one of `KINDS`.
        problems, configurations: sizes.
        generator: source of all randomness.

    Raises:
        ConfigError: unknown kind.
    """
    base_p = generator.beta(0.5, 3.0, problems) * (generator.random(problems) >= UNSOLVED)
    if kind == "identical":
        return np.repeat(base_p[:, None], configurations, axis=1)
    if kind == "dominated":
        return base_p[:, None] * np.linspace(1.0, 0.5, configurations)
    if kind == "complementary":
        kinds = max(2, configurations // 3)
        match_ps = generator.integers(0, kinds, problems)[:, None] == np.arange(configurations) % kinds
        skill_s = generator.uniform(0.7, 1.0, configurations)
        return np.where(match_ps, base_p[:, None], 0.02 * base_p[:, None]) * skill_s
    raise ConfigError(f"unknown population {kind!r}; allowed: {', '.join(KINDS)}.")


def generate_table(
    kind: str, problems: int, configurations: int, runs: int, generator: np.random.Generator
) -> CountTable:
    """A table drawn from a population, binomial successes of `runs`; the first half trains."""
    rates_ps = true_rates(kind, problems, configurations, generator)
    counts_ps = generator.binomial(runs, rates_ps)
    half = problems // 2
    return CountTable(
        problems=tuple(f"{kind}-{p:04d}" for p in range(problems)),
        configurations=tuple(f"configuration-{s}" for s in range(configurations)),
        counts=counts_ps,
        runs=np.full_like(counts_ps, runs),
        split=("train",) * half + ("test",) * (problems - half),
        source=f"generated, {kind}",
    )
