"""The limit on relative representation change: its formula, what it does to any optimizer's step, exact state."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.optim.lion import Lion, LionConfig
from torchstone.optim.liona import LionA
from torchstone.optim.lionar import LionAR
from torchstone.optim.rotational import Rotational
from torchstone.optim.rrc import RRCLimiter, rate_factor, signal_to_noise
from torchstone.optim.sgdm import SGDM

SIZE = 16
MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.3, fused=True),
    "lion": lambda p: Lion(p, 1e-2, (0.9, 0.8), 0.3),
    "liona": lambda p: LionA(p, 1e-2, 0.8, 0.3),
    "sgdm": lambda p: SGDM(p, 1e-2, 0.8),
    "lionar": lambda p: LionAR(p, 1e-2, 0.8, peak_lr=1e-2),
    "rotational": lambda p: Rotational(p, lr=1e-2, betas=(0.8, 0.9)),
}
every_optimizer = pytest.mark.parametrize("kind", MAKERS)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(draw(6, 9, seed=900)), nn.Parameter(draw(4, 5, seed=901))]


def give(values: list[nn.Parameter], step: int) -> None:
    """The first parameter's gradients agree over steps, the second one's do not."""
    values[0].grad = draw(6, 9, seed=50) + 0.3 * draw(6, 9, seed=step)
    values[1].grad = draw(4, 5, seed=2000 + step)


def expected_factors(beta: float, steps: int) -> list[list[float]]:
    """ρ of both parameters at every step, by the formula."""
    values, found = parameters(), []
    means, squares, raw = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for t in range(1, steps + 1):
        give(values, t)
        row = []
        for index, value in enumerate(values):
            assert value.grad is not None
            g = value.grad.double()
            means[index] = beta * means[index] + (1 - beta) * g  # type: ignore[operator]
            squares[index] = beta * squares[index] + (1 - beta) * float(g.square().sum())
            unbiased = 1 - beta**t
            r = float((means[index] / unbiased).square().sum()) / (squares[index] / unbiased)  # type: ignore[operator]
            kappa = (1 - beta) / (1 + beta)
            phi = max(0.0, (r - kappa) / (1 - r)) if r < 1 - 1e-9 else math.inf
            rho = math.sqrt((1 + phi / SIZE) / (1 + phi)) if phi < math.inf else SIZE**-0.5
            raw[index] = 0.9 * raw[index] + 0.1 * min(max(rho, 0.01), 1.0)
            row.append(raw[index] / (1 - 0.9**t))
        found.append(row)
    return found


def test_the_formula() -> None:
    kappa = 0.1 / 1.9
    assert signal_to_noise(kappa, 0.9) == pytest.approx(0.0, abs=1e-12) and signal_to_noise(0.0, 0.9) == 0.0
    assert signal_to_noise(0.5, 0.9) == pytest.approx((0.5 - kappa) / 0.5)
    assert signal_to_noise(1.0, 0.9) == math.inf
    assert rate_factor(0.0, 64) == 1.0
    assert rate_factor(math.inf, 64) == 0.125 == pytest.approx(rate_factor(1e12, 64))
    assert rate_factor(3.0, 10**9) == pytest.approx(0.5)


def test_independent_gradients_have_no_signal_and_equal_ones_nothing_else() -> None:
    for seeds, phi in ((range(400), (0.0, 0.05)), ([1] * 400, (1e3, math.inf))):
        m, square = torch.zeros(20_000), 0.0
        for seed in seeds:
            g = draw(20_000, seed=seed)
            m, square = 0.9 * m + 0.1 * g, 0.9 * square + 0.1 * float(g.square().sum())
        assert phi[0] <= signal_to_noise(float(m.square().sum()) / square, 0.9) <= phi[1]


@every_optimizer
def test_factors_are_those_of_the_formula(kind: str) -> None:
    values = parameters()
    limiter = RRCLimiter(MAKERS[kind](values), SIZE)
    for t, expected in enumerate(expected_factors(0.8, 8), start=1):
        give(values, t)
        limiter.optimizer.step()
        found = limiter.factors()
        assert [found[value] for value in values] == pytest.approx(expected, rel=1e-4), t
    assert found[values[0]] < 0.6 < found[values[1]]


@every_optimizer
def test_a_step_is_the_one_at_the_scaled_rate(kind: str) -> None:
    """Each parameter moves as in an optimizer of its own whose rate is ρ η."""
    values, alone = parameters(), parameters()
    limiter = RRCLimiter(MAKERS[kind](values), SIZE)
    singles = [MAKERS[kind]([value]) for value in alone]
    for t, factors in enumerate(expected_factors(0.8, 6), start=1):
        give(values, t)
        give(alone, t)
        limiter.optimizer.step()
        for single, factor in zip(singles, factors, strict=True):
            single.param_groups[0]["lr"] = 1e-2 * factor
            single.step()
    for value, other in zip(values, alone, strict=True):
        torch.testing.assert_close(value, other, atol=2e-6, rtol=1e-4)


@every_optimizer
def test_a_state_round_trip_goes_on_bit_for_bit(kind: str) -> None:
    def go(limiter: RRCLimiter, values: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            give(values, step)
            limiter.optimizer.step()

    straight, first = parameters(), parameters()
    go(RRCLimiter(MAKERS[kind](straight), SIZE), straight, range(8))
    limiter = RRCLimiter(MAKERS[kind](first), SIZE)
    go(limiter, first, range(4))
    state = copy.deepcopy(limiter.optimizer.state_dict())
    plain = {key: value for key, value in state["state"][0].items() if key.startswith("rrc_")}
    state["state"][0].update(json.loads(json.dumps(plain)))
    second = parameters()
    resumed = RRCLimiter(MAKERS[kind](second), SIZE)
    for value, stored in zip(second, first, strict=True):
        value.data.copy_(stored.data)
    resumed.optimizer.load_state_dict(state)
    go(resumed, second, range(4, 8))
    assert all(torch.equal(one, other) for one, other in zip(straight, second, strict=True))


def test_a_gradient_of_zero_leaves_the_rate() -> None:
    value = nn.Parameter(draw(3, 4, seed=0))
    limiter = RRCLimiter(Lion([value]), SIZE)
    value.grad = torch.zeros(3, 4)
    limiter.optimizer.step()
    assert limiter.factors()[value] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["adamw", "liona"])
def test_once_removed_steps_are_whole_again(kind: str) -> None:
    values, plain = parameters(), parameters()
    limited, other = MAKERS[kind](values), MAKERS[kind](plain)
    limiter = RRCLimiter(limited, SIZE)
    limiter.remove()
    for optimizer, of in ((limited, values), (other, plain)):
        give(of, 1)
        optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(values, plain, strict=True))


def test_the_recipe_setting_attaches_it() -> None:
    layer = nn.Linear(5, 4)
    optimizer = LionConfig(rrc_batch_size=SIZE).build(layer)
    layer(draw(3, 5, seed=0)).sum().backward()
    optimizer.step()
    assert optimizer.rates[layer.weight] == pytest.approx(SIZE**-0.5)
    assert LionConfig().build(layer).rates == {}


@pytest.mark.parametrize(
    "make_it, words",
    [
        (
            lambda p: RRCLimiter(torch.optim.SGD(p, lr=0.1), SIZE),
            "SGD was given; it knows torchstone's optimizers and torch's Adam",
        ),
        (lambda p: RRCLimiter(Lion(p), 1), "batch_size is 1"),
        (lambda p: RRCLimiter(Lion(p), SIZE, average=1.0), "average 1.0"),
        (lambda p: RRCLimiter(Lion(p), SIZE, least=0.0), "least 0.0"),
    ],
)
def test_what_is_refused(make_it: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_it(parameters())
