"""Signal and noise recovered where they are known, from moments of any optimizer and from two halves of a batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchstone.diagnose.updates.snr import GradientMoments, Noise, optimizer_beta, snr_of_halves
from torchstone.errors import ConfigError
from torchstone.optim.lion import Lion
from torchstone.optim.liona import LionA
from torchstone.optim.lionar import LionAR
from torchstone.optim.rotational import Rotational
from torchstone.optim.sgdm import SGDM

SIZE = 20_000  # numbers of the gradient: its squared norms then scatter by a percent
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda values: torch.optim.AdamW(values, lr=1e-3, betas=(0.9, 0.99)),
    "adam": lambda values: torch.optim.Adam(values, lr=1e-3, betas=(0.95, 0.99), fused=True),
    "sgd": lambda values: torch.optim.SGD(values, lr=1e-3, momentum=0.9),
    "nadam": lambda values: torch.optim.NAdam(values, lr=1e-3),
    "lion": lambda values: Lion(values, lr=1e-3, betas=(0.9, 0.95)),
    "liona": lambda values: LionA(values, lr=1e-3, beta=0.9),
    "lionar": lambda values: LionAR(values, lr=1e-3, peak_lr=1e-3, beta=0.95),
    "sgdm": lambda values: SGDM(values, lr=1e-3, momentum=0.9),
    "rotational sgdm": lambda values: Rotational(values, "sgdm", lr=1e-3),
    "rotational adamw": lambda values: Rotational(values, "adamw", lr=1e-3),
    "adagrad": lambda values: torch.optim.Adagrad(values, lr=1e-3),  # keeps no average: one is kept for it
}


def gradients(snr: float, steps: int, seed: int = 0) -> list[Tensor]:
    """A constant gradient of norm √snr under noise of norm 1."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(SIZE, generator=draw)
    mean *= snr**0.5 / mean.norm()
    return [mean + torch.randn(SIZE, generator=draw) / SIZE**0.5 for _ in range(steps)]


def observed(optimizer: str, snr: float, steps: int, beta: float | None = None, every: int = 1) -> list[Noise]:
    value = nn.Parameter(torch.randn(100, SIZE // 100, generator=torch.Generator().manual_seed(9)))
    made = OPTIMIZERS[optimizer]([value])
    moments = GradientMoments({"w": value}, made, beta)
    found = []
    for step, gradient in enumerate(gradients(snr, steps)):
        value.grad = gradient.view_as(value)
        moments.observe(measured=step % every == 0)
        made.step()
        found.append(moments.noises()["w"])
    return found


@pytest.mark.parametrize("snr", [0.01, 0.3, 10.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_recover_the_ratio_early_and_late(optimizer: str, snr: float) -> None:
    found = observed(optimizer, snr, 60)
    assert found[0].snr is None  # one gradient alone tells nothing
    for step in (4, 19, 59):
        assert found[step].snr == pytest.approx(snr, rel=0.1, abs=0.02), step


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad"])
def test_pure_noise_has_no_signal(optimizer: str) -> None:
    assert observed(optimizer, 0.0, 60)[-1].snr == pytest.approx(0, abs=0.02)


def test_the_average_kept_here_agrees_with_the_optimizers() -> None:
    for one, other in zip(observed("adamw", 0.5, 30), observed("adamw", 0.5, 30, beta=0.9), strict=True):
        assert one.signal == pytest.approx(other.signal, rel=1e-4, abs=1e-6)
        assert one.noise == pytest.approx(other.noise, rel=1e-4)
        assert one.crossed == pytest.approx(other.crossed, rel=1e-4, abs=1e-6)


def test_alignment_is_with_the_momentum_before_the_gradient_joined_it() -> None:
    found, fed = observed("adamw", 0.5, 3), gradients(0.5, 3)
    assert found[0].alignment is None
    for step in (1, 2):
        momentum = torch.zeros(SIZE)
        for gradient in fed[:step]:
            momentum = 0.9 * momentum + 0.1 * gradient
        exact = torch.nn.functional.cosine_similarity(fed[step], momentum, dim=0)
        assert found[step].alignment == pytest.approx(float(exact), rel=1e-4)


def test_a_first_gradient_is_not_taken_for_pure_signal() -> None:
    assert observed("adamw", 0.0, 1)[0].snr is None
    assert (observed("adamw", 0.0, 2)[1].snr or 0) < 0.05  # the steady κ would read half of two noises as signal


@pytest.mark.parametrize("snr", [0.2, 5.0])
def test_halves_agree_with_the_truth_and_with_moments(snr: float) -> None:
    draws = gradients(snr / 2, 40)  # a half has half the samples, so half the ratio
    halves = [snr_of_halves([first], [second]) for first, second in zip(draws[::2], draws[1::2], strict=True)]
    assert sum(halves) / len(halves) == pytest.approx(snr, rel=0.05)
    assert observed("adamw", snr, 60)[-1].snr == pytest.approx(sum(halves) / len(halves), rel=0.1)


def test_halves_of_other_parameters_and_equal_halves_are_refused() -> None:
    with pytest.raises(ConfigError, match="given 1 and 2"):
        snr_of_halves([torch.ones(2)], [torch.ones(2)] * 2)
    with pytest.raises(ConfigError, match="equal gradients, so there is no noise"):
        snr_of_halves([torch.ones(2)], [torch.ones(2)])


@pytest.mark.parametrize(
    ("made", "beta"),
    [
        (lambda w: torch.optim.AdamW(w, betas=(0.8, 0.9), weight_decay=0.1), 0.8),
        (lambda w: torch.optim.Adam(w, betas=(0.8, 0.9), weight_decay=0.1), None),  # decay joins its moments
        (lambda w: torch.optim.Adam(w, betas=(0.8, 0.9), maximize=True), None),
        (lambda w: torch.optim.SGD(w, lr=1.0, momentum=0.7), 0.7),
        (lambda w: torch.optim.SGD(w, lr=1.0, momentum=0.7, nesterov=True), 0.7),
        (lambda w: torch.optim.SGD(w, lr=1.0), None),
        (lambda w: torch.optim.SGD(w, lr=1.0, momentum=0.7, dampening=0.5), None),
        (lambda w: torch.optim.SGD(w, lr=1.0, momentum=0.7, weight_decay=0.1), None),
        (lambda w: torch.optim.RMSprop(w), None),
        (lambda w: Lion(w, betas=(0.8, 0.95)), 0.95),
        (lambda w: LionA(w, beta=0.7, weight_decay=0.1), 0.7),
        (lambda w: SGDM(w, momentum=0.7), 0.7),
        (lambda w: SGDM(w, momentum=0.7, weight_decay=0.1), None),
    ],
)
def test_which_averages_are_taken_from_the_optimizer(
    made: Callable[[list[nn.Parameter]], torch.optim.Optimizer], beta: float | None
) -> None:
    optimizer = made([nn.Parameter(torch.ones(2, 2))])
    assert optimizer_beta(optimizer, optimizer.param_groups[0]) == beta


def test_ratios_of_several_matrices_add_signal_and_noise() -> None:
    together = Noise(signal=1.0, noise=2.0) + Noise(signal=2.0, noise=4.0)
    assert together.snr == pytest.approx(0.5)
    assert Noise(signal=-1.0, noise=2.0).snr == 0.0 and Noise(signal=1.0).snr is None
