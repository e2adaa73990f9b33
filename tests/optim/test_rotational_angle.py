"""Target angles and update sizes: identities between the rules, and simulations of what the formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torchstone.optim import angle
from torchstone.optim.lion import Lion
from torchstone.optim.liona import LionA
from torchstone.optim.rotational import Rotational


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.98])
def test_lion_with_equal_betas_has_adamws_factor(beta: float) -> None:
    assert angle.lion_rms((beta, beta)) == pytest.approx(angle.average_rms(beta), rel=1e-12)


@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_nesterov_is_lions_direction_with_the_square(beta: float) -> None:
    """LionA with Nesterov's β moves like Lion with β1 = β², β2 = β, scaled by γ."""
    ours, theirs = (nn.Parameter(torch.zeros(7, 5)) for _ in range(2))
    gamma = angle.average_rms(beta)
    liona, lion = LionA([ours], 1e-2, beta, nesterov=True), Lion([theirs], 1e-2 * gamma, (beta**2, beta))
    for step in range(20):
        ours.grad, theirs.grad = noise(7, 5, seed=step), noise(7, 5, seed=step)
        liona.step()
        lion.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.9, 0.98])
def test_adamws_updates_have_size_one_at_first_and_gamma_later(beta: float) -> None:
    """Root mean square of torch's own update / η under independent gradients."""
    weight = nn.Parameter(torch.zeros(20_000))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(beta, 0.999), weight_decay=0.0)
    sizes = []
    for step in range(700):
        before = weight.detach().clone()
        weight.grad = noise(20_000, seed=step)
        optimizer.step()
        sizes.append(float((weight.detach() - before).square().mean().sqrt()))
    assert sizes[0] == pytest.approx(1.0, abs=1e-4)
    late = sum(sizes[-100:]) / 100
    assert late == pytest.approx(angle.average_rms(beta), rel=0.03)
    assert sizes[0] / late == pytest.approx(angle.adamw_overshoot(beta), rel=0.03)


def test_known_values() -> None:
    assert angle.average_rms(0.9) == pytest.approx(0.2294, abs=1e-4)
    assert angle.average_rms(0.98) == pytest.approx(0.1005, abs=1e-4)
    assert angle.adamw_overshoot(0.9) == pytest.approx(4.36, abs=1e-2)


def test_adamw_settles_at_its_angle() -> None:
    """Under independent gradients, rows turn by θ per step once weight decay balances the updates."""
    lr, decay, beta = 0.02, 0.5, 0.9
    weight = nn.Parameter(noise(40, 200, seed=0) * 0.02)
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=(beta, 0.99), weight_decay=decay)
    turned = []
    for step in range(700):
        before = weight.detach().clone()
        weight.grad = noise(40, 200, seed=step + 1)
        optimizer.step()
        cosine = torch.nn.functional.cosine_similarity(before.double(), weight.detach().double())
        turned.append(float(torch.acos(cosine).square().mean().sqrt()))
    assert sum(turned[-200:]) / 200 == pytest.approx(angle.adamw_angle(lr, decay, beta), rel=0.1)


@pytest.mark.parametrize(
    "inner, theta",
    [
        ("adamw", math.sqrt(2 * 1e-2 * 0.3) * math.sqrt(0.1 / 1.9)),
        ("lion", math.sqrt(math.pi / 2 * 2 * 1e-2 * 0.3 * (0.1**2 + 0.9**2 * 0.01 / 1.99))),
        ("sgdm", math.sqrt(2 * 1e-2 * 0.3 / 1.9)),
    ],
)
def test_target_angles_of_the_inner_rules(inner: str, theta: float) -> None:
    optimizer = Rotational([nn.Parameter(noise(3, 4, seed=0))], inner, lr=1e-2, weight_decay=0.3)  # type: ignore[arg-type]
    assert optimizer.angles() == [pytest.approx(theta, rel=1e-12)]


def test_rotation_is_the_arc_tangent() -> None:
    assert angle.rotation(0.1) == math.atan(0.1)
