"""SGDM equals torch's SGD with momentum, by kernel and by tensor operations, and its recipe part builds it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from updates import both_ways

from torchstone.errors import ConfigError
from torchstone.optim.sgdm import SGDM, SGDMConfig
from torchstone.recipe.registry import parse_part


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(5, 37, generator=torch.Generator().manual_seed(9)))


@both_ways
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torchs(fused: bool, decay: float) -> None:
    ours, theirs = weight(), weight()
    first = SGDM([ours], 0.05, momentum=0.8, weight_decay=decay, fused=fused)
    second = torch.optim.SGD([theirs], 0.05, momentum=0.8, weight_decay=decay)
    for step in range(6):
        ours.grad = theirs.grad = torch.randn(5, 37, generator=torch.Generator().manual_seed(step))
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_closure_is_evaluated_with_gradients() -> None:
    parameter = weight()
    optimizer = SGDM([parameter], 0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    before = parameter.detach().square().sum()
    assert optimizer.step(closure) == pytest.approx(float(before))
    assert parameter.detach().square().sum() < before


def test_a_torch_schedule_drives_it() -> None:
    parameter = weight()
    optimizer = SGDM([parameter], 1.0, momentum=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        before, parameter.grad = parameter.detach().clone(), torch.ones(5, 37)
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(before - parameter.detach(), torch.full((5, 37), 0.5**step))


def test_the_recipe_part_builds_it() -> None:
    config = parse_part("optimizer", {"kind": "sgdm", "momentum": 0.7, "learning_rate": 0.2})
    optimizer = config.build(nn.Linear(3, 2))
    assert [group["momentum"] for group in optimizer.param_groups] == [0.7, 0.7]
    assert SGDMConfig.inherit({"kind": "adamw", "learning_rate": 1e-3, "clip": 0.5, "weight_decay": 0.2}) == {
        "weight_decay": 0.2
    }


@pytest.mark.parametrize("settings", [{"momentum": 1.0}, {"learning_rate": 0}, {"clip": 0}])
def test_values_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises((ConfigError, ValueError), match=next(iter(settings))):
        parse_part("optimizer", {"kind": "sgdm", **settings})
