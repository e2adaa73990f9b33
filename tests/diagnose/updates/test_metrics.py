"""Length, angle and response of one update against fp64 definitions, down to angles that fp32 cosines cannot see."""

from __future__ import annotations

import math

import pytest
import torch

from torchstone.diagnose.updates import metrics
from torchstone.diagnose.updates.metrics import change_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def angle(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """2·arcsin of half the distance of unit vectors, in fp64, over the last dimension."""
    unit, turned = (value / value.norm(dim=-1, keepdim=True) for value in (before, after))
    return 2 * ((turned - unit).norm(dim=-1) / 2).clamp(max=1).arcsin()


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6), (1, 1000)])
def test_lengths_and_angles_are_those_of_the_definition(size: float, shape: tuple[int, ...]) -> None:
    before, delta = drawn(*shape), size * drawn(*shape, seed=1)
    change = change_of(before, before + delta)
    assert change.moved == pytest.approx(float(delta.norm()) ** 2, rel=1e-9)
    assert change.square == pytest.approx(float(before.norm()) ** 2, rel=1e-9)
    assert change.numbers == before.numel()
    assert change.angle == pytest.approx(float(angle(before.flatten(), (before + delta).flatten())), rel=1e-6)
    torch.testing.assert_close(
        change.neuron_angles_o, angle(before.flatten(1), (before + delta).flatten(1)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3])
def test_small_angles_survive_fp32(size: float) -> None:
    before = drawn(64, 48).float()
    after = (before.double() + size * drawn(64, 48, seed=1)).float()
    change = change_of(before, after)
    exact = angle(before.double().flatten(), after.double().flatten())
    assert change.angle == pytest.approx(float(exact), rel=1e-5)
    torch.testing.assert_close(change.neuron_angles_o, angle(before.double(), after.double()), rtol=1e-4, atol=0)
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0).clamp(max=1)
    if size == 1e-5:  # the plain formula sees nothing there
        assert abs(float(cosine.arccos()) - float(exact)) > 0.1 * float(exact)


def test_decay_alone_turns_nothing() -> None:
    before = drawn(32, 16).float()
    assert change_of(before, before * (1 - 1e-3)).angle < 1e-6  # a thousandth of the step


def test_opposite_directions_are_half_a_turn() -> None:
    before = drawn(4, 8)
    assert change_of(before, -before).angle == pytest.approx(math.pi)


def test_rows_of_zeros_have_no_angle() -> None:
    before = drawn(3, 4)
    before[1] = 0
    after = before + 0.1 * drawn(3, 4, seed=1)
    angles_o = change_of(before, after).neuron_angles_o
    assert angles_o[1].isnan() and angles_o[[0, 2]].isfinite().all()
    assert math.isnan(change_of(before, torch.zeros_like(before)).angle)


@pytest.mark.parametrize("block", [1, 12, 1 << 18])
def test_responses_are_those_of_the_definition_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setitem(metrics.BLOCK, "cpu", block)
    before, delta, inputs = drawn(9, 5), 0.01 * drawn(9, 5, seed=1), drawn(20, 5, seed=2)
    change = change_of(before, before + delta, inputs)
    old, moved = inputs @ before.T, inputs @ delta.T
    assert change.rrc == pytest.approx(float(moved.norm() / old.norm()), rel=1e-9)
    torch.testing.assert_close(change.neuron_rrcs_o, moved.norm(dim=0) / old.norm(dim=0), rtol=1e-9, atol=0)
    assert change_of(before, before + delta).rrc is None


def test_bf16_weights_are_measured_as_stored() -> None:
    before = drawn(16, 16).bfloat16()
    after = (before.float() + 0.05 * drawn(16, 16, seed=1).float()).bfloat16()
    change = change_of(before, after)
    assert change.moved == pytest.approx(float((after.double() - before.double()).norm()) ** 2, rel=1e-5)
    assert change_of(before, (before.float() * (1 + 1e-4)).bfloat16()).moved == 0  # below their resolution
