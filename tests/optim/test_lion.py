"""Lion, LionA and LionAR: the published updates, sizes that stay, bias corrections, and recipe parts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from updates import both_ways

from torchstone.errors import ConfigError
from torchstone.optim.angle import average_rms, lion_rms, rotation
from torchstone.optim.lion import Lion, LionConfig
from torchstone.optim.liona import LionA, LionAConfig
from torchstone.optim.lionar import LionAR
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.recipe.registry import parse_part


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(draw(*shape, seed=99))


def steps(optimizer: MomentumOptimizer, parameter: nn.Parameter, count: int) -> list[Tensor]:
    """What each step adds, under gradients that depend on the step only."""
    changes = []
    for step in range(count):
        before = parameter.detach().clone()
        parameter.grad = draw(*parameter.shape, seed=step)
        optimizer.step()
        changes.append(parameter.detach() - before)
    return changes


@both_ways
def test_lion_is_the_published_update(fused: bool) -> None:
    parameter = weight(5, 37)
    optimizer = Lion([parameter], 1e-2, (0.8, 0.95), weight_decay=0.3, fused=fused)
    w, m = parameter.detach().double(), torch.zeros(5, 37, dtype=torch.float64)
    for step in range(6):
        g = draw(5, 37, seed=step)
        parameter.grad = g
        optimizer.step()
        u = torch.sign(0.8 * m + 0.2 * g.double())
        w, m = w - 1e-2 * (u + 0.3 * w), 0.95 * m + 0.05 * g.double()
        torch.testing.assert_close(parameter.detach().double(), w, atol=1e-6, rtol=1e-6)


@both_ways
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("correction", ["none", "adam", "inverse", "rms"])
def test_liona_is_its_definition(nesterov: bool, correction: Any, fused: bool) -> None:
    beta, parameter = 0.9, weight(5, 37)
    optimizer = LionA([parameter], 1e-2, beta, 0.3, nesterov, correction, fused=fused)
    w, m = parameter.detach().double(), torch.zeros(5, 37, dtype=torch.float64)
    for t in range(1, 7):
        g = draw(5, 37, seed=t).double()
        parameter.grad = g.float()
        optimizer.step()
        m = beta * m + (1 - beta) * g
        mean = m / (1 - beta**t) if correction == "adam" else m
        v = beta * mean + (1 - beta) * g if nesterov else mean
        factor = {"inverse": 1 - beta**t, "rms": math.sqrt(1 - beta ** (2 * t))}.get(correction, 1.0)
        w = w - 1e-2 * (factor * average_rms(beta) * torch.sign(v) + 0.3 * w)
        torch.testing.assert_close(parameter.detach().double(), w, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_every_update_of_liona_has_size_gamma(nesterov: bool) -> None:
    parameter = nn.Parameter(torch.zeros(20, 30))
    for change in steps(LionA([parameter], 1.0, 0.9, nesterov=nesterov), parameter, 5):
        assert float(change.square().mean().sqrt()) == pytest.approx(average_rms(0.9), rel=1e-5)


def turned(before: Tensor, after: Tensor) -> Tensor:
    return torch.acos(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1))


@both_ways
@pytest.mark.parametrize(
    "given, gamma, beta",
    [
        ({"beta": 0.9, "nesterov": False}, average_rms(0.9), 0.9),
        ({"beta": 0.98}, average_rms(0.98), 0.98),
        ({"betas": (0.9, 0.99)}, lion_rms((0.9, 0.99)), 0.99),
    ],
)
@pytest.mark.parametrize("correction", ["none", "inverse", "rms"])
def test_lionar_turns_by_its_angle_at_every_step(
    given: dict[str, Any], gamma: float, beta: float, correction: Any, fused: bool
) -> None:
    """θ = √(2λ/η_peak) η γ times the bias correction, at rates of a warmup."""
    parameter, peak, decay = weight(8, 50), 2e-2, 0.5
    optimizer = LionAR(
        [parameter], peak, weight_decay=decay, bias_correction=correction, peak_lr=peak, fused=fused, **given
    )
    for t, rate in enumerate((0.005, 0.01, 0.02, 0.02, 0.01), start=1):
        optimizer.param_groups[0]["lr"] = rate
        before = parameter.detach().clone()
        parameter.grad = draw(8, 50, seed=t)
        optimizer.step()
        factor = {"inverse": 1 - beta**t, "rms": math.sqrt(1 - beta ** (2 * t))}.get(correction, 1.0)
        theta = math.sqrt(2 * decay / peak) * rate * gamma
        expected = torch.full((8,), rotation(theta * factor), dtype=torch.float64)
        torch.testing.assert_close(turned(before, parameter.detach()), expected, rtol=2e-3, atol=0)


def test_lionar_follows_the_sign_of_its_momentum() -> None:
    """The plain formula for one step of one row, Nesterov's momentum, no centring."""
    parameter = weight(1, 9)
    w, g = parameter.detach().double(), draw(1, 9, seed=0).double()
    optimizer = LionAR([parameter], 1e-2, 0.9, weight_decay=2.0, zero_mean=False, bias_correction="none", peak_lr=1e-2)
    parameter.grad = g.float()
    optimizer.step()
    d, norm = torch.sign(g), w.norm()
    d = d - w * (d * w).sum() / norm**2
    w = w - math.sqrt(2 * 1e-2 * 2.0) * average_rms(0.9) * norm * d / d.norm()
    torch.testing.assert_close(parameter.detach().double(), w * norm / w.norm(), atol=1e-6, rtol=0)


def test_under_lionar_vectors_take_lionas_steps_without_decay_and_groups_apart_with_theirs() -> None:
    vector, apart, matrix = weight(6), weight(4, 3), weight(3, 4)
    groups = [{"params": [matrix, vector]}, {"params": [apart], "rotational": False}]
    optimizer = LionAR(groups, 1e-2, weight_decay=0.5, peak_lr=1e-2)
    like = {"lr": 1e-2, "beta": 0.98, "nesterov": True, "bias_correction": "inverse"}
    for value, decay in ((vector, 0.0), (apart, 0.5)):
        other = nn.Parameter(value.detach().clone())
        theirs = LionA([other], weight_decay=decay, **like)  # type: ignore[arg-type]
        for step in range(3):
            value.grad, other.grad = draw(*value.shape, seed=step), draw(*value.shape, seed=step)
            optimizer.step()
            theirs.step()
        value.grad = None
        assert torch.equal(value, other)
    assert "row_norm" not in optimizer.state[apart]


@pytest.mark.parametrize("make", [lambda p: Lion(p, 1e-2), lambda p: LionA(p, 1e-2, bias_correction="inverse")])
def test_a_state_round_trip_goes_on_bit_for_bit(make: Any) -> None:
    straight, first = weight(5, 6), weight(5, 6)
    expected = steps(make([straight]), straight, 6)
    optimizer = make([first])
    steps(optimizer, first, 3)
    second = nn.Parameter(first.detach().clone())
    resumed = make([second])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        second.grad = draw(5, 6, seed=step)
        resumed.step()
    assert len(expected) == 6 and torch.equal(second, straight)


def test_lion_and_liona_do_not_rotate() -> None:
    with pytest.raises(ConfigError, match="Lion does not rotate, and a group gives rotational"):
        Lion([{"params": [weight(2, 3)], "rotational": True}])


@pytest.mark.parametrize(
    "make_it, words",
    [
        (lambda: Lion([weight(2, 3)], betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
        (lambda: LionA([weight(2, 3)], beta=1.0), "beta is 1.0"),
        (lambda: LionA([weight(2, 3)], bias_correction="half"), "bias_correction is 'half'; choose one of none, adam"),  # type: ignore[arg-type]
        (lambda: Lion([weight(2, 3)], lr=float("nan")), "lr is nan"),
    ],
)
def test_what_is_refused(make_it: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_it()


@pytest.mark.parametrize(
    "config", [LionConfig(betas=(0.8, 0.9)), LionAConfig(beta=0.7, nesterov=True, bias_correction="rms")]
)
def test_recipe_parts_build_what_they_say(config: Any) -> None:
    layer = nn.Linear(3, 2)
    optimizer = config.build(layer)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
    assert all(group["lr"] == config.learning_rate for group in optimizer.param_groups)
    for name in ("betas", "beta", "nesterov", "bias_correction"):
        if hasattr(config, name):
            assert optimizer.param_groups[0][name] == getattr(config, name)
    assert config.clip is None


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("lion", {"betas": [0.9, 1.0]}),
        ("lion", {"learning_rate": 0}),
        ("liona", {"beta": 1.0}),
        ("lionar", {"beta": -0.1}),
    ],
)
def test_recipe_values_out_of_range_are_refused(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError), match=next(iter(settings))):
        parse_part("optimizer", {"kind": kind, **settings})


def test_what_carries_over_from_adamw() -> None:
    previous = {
        "kind": "adamw",
        "learning_rate": 3e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.2,
        "clip": 1.0,
    }
    assert LionConfig.inherit(previous) == {"weight_decay": 0.2}
    assert LionAConfig.inherit(previous) == {"learning_rate": 3e-3, "weight_decay": 0.2}
