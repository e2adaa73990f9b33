"""An upper bound on what any allocation can reach: the certificate.

If samples could be split, the problem would be to maximise the concave function

    f(x) = mean_p [ 1 - exp(-Σ_i x_i a[p,i]) ],   a = -log(1 - q),   x >= 0,  Σ_i c_i x_i <= B

over a simplex. Concavity gives for *any* feasible x with gradient g

    best allocation <= f(x) + B max_i g_i / c_i - g·x

so the bound is sound however well x was optimised; optimising only makes it tight. It ignores that samples
are whole: loose for one or two samples, within 1e-4 of the truth from about 16 on.

The maximiser: Newton's method. Each quadratic model is maximised over the simplex exactly by an active-set
method (there are few configurations and fewer in the optimum), so a handful of steps reach 1e-11.
"""

from __future__ import annotations

import numpy as np

from torchstone.llm.allocation.objectives import Floats

_ROUNDS = 60


def upper_bound(rates_ps: Floats, budget: float, cost_s: Floats, tolerance: float = 1e-11) -> float:
    """Sound upper bound on the train value of every allocation within the budget.

    Args:
        rates_ps: (P, S) success probabilities.
        budget: total cost allowed, > 0.
        cost_s: (S,) cost of one sample, > 0.
        tolerance: stop once bound - f(x) is below it.
    """
    # In y = c x / B the feasible set is the unit simplex.
    rate_ps = -np.log(np.maximum(1 - rates_ps, 1e-12)) * (budget / cost_s)
    y_s = np.full(cost_s.size, 1 / cost_s.size)
    best = np.inf
    for _ in range(_ROUNDS):
        value, gradient_s = _value_and_gradient(rate_ps, y_s)
        best = min(best, value + float(gradient_s.max() - gradient_s @ y_s))
        if best - value <= tolerance:
            break
        y_s = _step(rate_ps, y_s, value, gradient_s)
    return min(best, 1.0)


def _value_and_gradient(rate_ps: Floats, y_s: Floats) -> tuple[float, Floats]:
    fail_p = np.exp(-rate_ps @ y_s)
    return 1 - float(fail_p.mean()), fail_p @ rate_ps / fail_p.size


def _step(rate_ps: Floats, y_s: Floats, value: float, gradient_s: Floats) -> Floats:
    """A Newton step, halved until the value does not fall; failing that, weight goes to the largest gradient.

    Near the optimum the value changes by less than rounding while the bound still improves, hence the slack.
    """
    target_s = _maximise_quadratic(*_quadratic(rate_ps, y_s, gradient_s), y_s)
    vertex_s = np.zeros_like(y_s)
    vertex_s[int(np.argmax(gradient_s))] = 1.0
    for goal_s, slack in ((target_s, 1e-15), (vertex_s, 0.0)):
        for halving in range(12):
            candidate_s = y_s + 0.5**halving * (goal_s - y_s)
            if 1 - float(np.exp(-rate_ps @ candidate_s).mean()) >= value - slack:
                return candidate_s
    return y_s


def _quadratic(rate_ps: Floats, y_s: Floats, gradient_s: Floats) -> tuple[Floats, Floats]:
    """A and b of the local model b·z - ½ zᵀAz (up to a constant), with a little ridge for flat directions."""
    fail_p = np.exp(-rate_ps @ y_s)
    curvature_ss = (rate_ps.T * fail_p) @ rate_ps / fail_p.size
    curvature_ss += (1e-12 * np.trace(curvature_ss) + 1e-300) * np.eye(y_s.size)
    return curvature_ss, gradient_s + curvature_ss @ y_s


def _maximise_quadratic(a_ss: Floats, b_s: Floats, start_s: Floats) -> Floats:
    """Maximise b·z - ½ zᵀAz over the unit simplex by an active-set method; A positive definite, S small."""
    z_s = start_s.copy()
    support = z_s > 0
    for _ in range(4 * z_s.size):
        index = np.flatnonzero(support)
        system = np.ones((index.size + 1, index.size + 1))
        system[:-1, :-1] = a_ss[np.ix_(index, index)]
        system[-1, -1] = 0.0
        solution = np.linalg.lstsq(system, np.append(b_s[index], 1.0), rcond=None)[0]
        goal_f, level = solution[:-1], float(solution[-1])
        if (goal_f >= 0).all():
            z_s[:] = 0.0
            z_s[index] = goal_f
            excess_s = np.where(support, -np.inf, b_s - a_ss @ z_s - level)
            if excess_s.max() <= 1e-14 * (1 + abs(level)):
                break
            support[int(np.argmax(excess_s))] = True
            continue
        move_f = goal_f - z_s[index]
        ratio_f = np.where(goal_f < 0, z_s[index] / np.maximum(-move_f, 1e-300), np.inf)
        blocking = int(np.argmin(ratio_f))
        z_s[index] = np.maximum(z_s[index] + ratio_f[blocking] * move_f, 0.0)
        z_s[index[blocking]] = 0.0
        support[index[blocking]] = False
    return z_s / z_s.sum()
