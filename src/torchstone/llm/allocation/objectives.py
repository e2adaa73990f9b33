"""The two objectives of sample allocation, kept apart.

Problem p = 1..P, configuration i = 1..S, `counts` s[p,i] successes out of `runs` N[p,i] trials, allocation
n_i samples of configuration i. A problem is solved if at least one sample is right (a verifier picks it).

    train   f(n) = mean_p [ 1 - Π_i (1 - s/N)^n_i ]                     smooth, concave in n; to maximise
    test    g(n) = mean_p [ 1 - Π_i C(N-s, n_i) / C(N, n_i) ]           unbiased for pass@C; to report

f at its own maximum is optimistic (it was selected for being large), so it is never a result. g needs n_i
<= N: there is no unbiased estimate of 20 samples from 16 runs.

Source: Zhang et al., arXiv 2410.22480, section 3; unbiased pass@k as in Chen et al., arXiv 2107.03374.

Shape legend: p problem, s configuration (S of them), k number of samples, j position along a path of
allocations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import fftconvolve
from scipy.special import gammaln

from torchstone.errors import DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def check_counts(counts: ArrayLike, runs: ArrayLike, names: Sequence[str] | None = None) -> tuple[Ints, Ints]:
    """Counts and runs as integer (P, S) arrays.

    Args:
        counts: (P, S) successes.
        runs: trials: one number, one per configuration (S,), or one per problem and configuration (P, S).
        names: configuration names for the messages.

    Raises:
        DataError: wrong shapes, numbers that are not whole, no trial, successes below 0 or above the trials.
    """
    counts_ps = _whole(counts, "counts")
    if counts_ps.ndim != 2 or counts_ps.size == 0:
        raise DataError(
            "counts must be a table problems × configurations with at least one of each; given shape "
            f"{counts_ps.shape}."
        )
    raw_runs = _whole(runs, "runs")
    try:
        runs_ps = np.array(np.broadcast_to(raw_runs, counts_ps.shape))
    except ValueError:
        raise DataError(
            f"runs have shape {raw_runs.shape}, counts {counts_ps.shape}; give one number, one per "
            f"configuration ({counts_ps.shape[1]}), or one per problem and configuration."
        ) from None

    def cell(mask: NDArray[np.bool_]) -> str:
        p, s = map(int, np.argwhere(mask)[0])
        where = f"problem {p + 1}, configuration {names[s] if names else s + 1}"
        return f"{where}: {counts_ps[p, s]} successes of {runs_ps[p, s]} runs ({int(mask.sum())} such cells)"

    if (runs_ps < 1).any():
        raise DataError(f"every configuration needs at least one run on every problem; {cell(runs_ps < 1)}.")
    wrong = (counts_ps < 0) | (counts_ps > runs_ps)
    if wrong.any():
        raise DataError(f"successes must lie between 0 and the number of runs; {cell(wrong)}.")
    return counts_ps, runs_ps


def pass_at_k(runs: int, successes: int, k: int) -> float:
    """Unbiased probability that at least one of k samples is right, from `successes` of `runs` trials.

    1 - C(N-s, k) / C(N, k), as a product of k factors.

    Raises:
        DataError: no runs, successes outside 0..runs, or k outside 0..runs.
    """
    check_counts([[successes]], [[runs]])
    if not 0 <= k <= runs:
        raise DataError(
            f"pass@{k} has no unbiased estimate from {runs} runs; k must lie between 0 and the number of runs."
        )
    steps = np.arange(k)
    return float(1 - np.prod(np.maximum(runs - successes - steps, 0) / (runs - steps)))


def success_rates(counts_ps: Ints, runs_ps: Ints) -> Floats:
    """(P, S) plug-in success probabilities q = s / N."""
    return np.asarray(counts_ps / runs_ps, dtype=np.float64)


def train_value(rates_ps: Floats, allocation_s: ArrayLike) -> float:
    """f(n): mean over problems of the plug-in probability of at least one success."""
    return float(1 - failure(rates_ps, allocation_s).mean())


def failure(rates_ps: Floats, allocation_s: ArrayLike) -> Floats:
    """(P,) plug-in probability that all samples fail."""
    return np.asarray(((1 - rates_ps) ** np.asarray(allocation_s)).prod(axis=1))


def failure_tables(counts_ps: Ints, runs_ps: Ints, most: int) -> Floats:
    """(P, S, most + 1) unbiased probability that k samples all fail, k = 0..most; NaN where k > runs."""
    k = np.arange(most)
    left = runs_ps[:, :, None] - k
    factors = np.maximum(left - counts_ps[:, :, None], 0) / np.where(left > 0, left, 1)
    factors = np.where(left > 0, factors, np.nan)
    ones = np.ones((*counts_ps.shape, 1))
    return np.concatenate([ones, np.cumprod(factors, axis=2)], axis=2)


def unbiased_failure(
    counts_ps: Ints, runs_ps: Ints, allocations_js: ArrayLike, names: Sequence[str] | None = None
) -> Floats:
    """(J, P) unbiased probability that all samples of allocation j fail on problem p; g = 1 - its mean.

    Raises:
        DataError: an allocation asks more samples of a configuration than it has runs on some problem.
    """
    allocation = np.atleast_2d(np.asarray(allocations_js))
    most_s, least_s = allocation.max(axis=0), runs_ps.min(axis=0)
    if (most_s > least_s).any():
        worst = int(np.argmax(most_s - least_s))
        name = names[worst] if names else f"number {worst + 1}"
        raise DataError(
            f"configuration {name} gets {most_s[worst]} samples but the test table has only {least_s[worst]} "
            "runs of it; an unbiased estimate needs at least as many runs as samples. Lower the budget or "
            "add runs."
        )
    tables_psk = failure_tables(counts_ps, runs_ps, int(most_s.max()))
    result = np.ones((allocation.shape[0], counts_ps.shape[0]))
    for s in np.flatnonzero(most_s):
        result *= tables_psk[:, s, :][:, allocation[:, s]].T
    return result


def uniform_failure(counts_ps: Ints, runs_ps: Ints, budget: int) -> Floats:
    """(P,) unbiased probability that `budget` samples of uniformly drawn configurations all fail.

    The mean of Π_i fail_i(n_i) over multinomial n, exactly instead of by draws. n_i are independent
    Poisson(C/S) given their sum C, so with a_i(k) = fail_i(k) Poisson(k; C/S) the mean is (a_1 * … *
    a_S)(C) / Poisson(C; C).

    Raises:
        DataError: some configuration has fewer than `budget` runs.
    """
    if runs_ps.min() < budget:
        raise DataError(
            f"uniform mixing may draw one configuration {budget} times, but only {runs_ps.min()} runs are "
            "there; lower the budget or add runs."
        )
    tables_psk = failure_tables(counts_ps, runs_ps, budget)
    k = np.arange(budget + 1)
    mean = budget / counts_ps.shape[1]
    weight_k = np.exp(k * np.log(mean) - mean - gammaln(k + 1)) if budget else np.ones(1)
    total_pk = tables_psk[:, 0] * weight_k
    for s in range(1, counts_ps.shape[1]):
        total_pk = fftconvolve(total_pk, tables_psk[:, s] * weight_k, axes=1)[:, : budget + 1]
    at_budget = float(np.exp(budget * np.log(budget) - budget - gammaln(budget + 1))) if budget else 1.0
    return np.clip(total_pk[:, budget] / at_budget, 0.0, 1.0)


def _whole(values: ArrayLike, what: str) -> Ints:
    array = np.asarray(values)
    if array.dtype.kind not in "iufb":
        raise DataError(f"{what} must be numbers; given {array.dtype}.")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        raise DataError(f"{what} must be whole numbers; given {array[~(array == np.round(array))].flat[0]!r}.")
    return array.astype(np.int64)
