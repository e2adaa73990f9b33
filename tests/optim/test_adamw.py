"""AdamW: the published update, decay where it belongs, a fused kernel that agrees with the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchstone.errors import ConfigError
from torchstone.optim.adamw import AdamWConfig
from torchstone.recipe.registry import parse_part


def model() -> nn.Module:
    layer = nn.Linear(3, 2)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    nn.init.ones_(layer.bias)
    return layer


def test_update_is_the_published_one():
    layer = model()
    config = AdamWConfig(learning_rate=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    optimizer = config.build(layer)
    expected = {name: value.detach().clone().double() for name, value in layer.named_parameters()}
    moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 4):
        for name, value in layer.named_parameters():
            value.grad = torch.randn(value.shape, generator=generator)
            gradient, (m, v) = value.grad.double(), moments[name]
            m.mul_(0.8).add_(0.2 * gradient)
            v.mul_(0.9).add_(0.1 * gradient**2)
            decay = 0.5 if value.dim() == 2 else 0.0
            update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
            expected[name] -= 1e-2 * (update + decay * expected[name])
        optimizer.step()
    for name, value in layer.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name].float(), rtol=1e-5, atol=1e-6)


def test_it_is_fused():
    assert all(group["fused"] for group in AdamWConfig().build(model()).param_groups)


@pytest.mark.parametrize("settings", [{"learning_rate": 0}, {"betas": [0.9, 1.0]}, {"betas": [-0.1, 0.9]}, {"eps": 0}])
def test_values_out_of_range_are_refused(settings):
    with pytest.raises((ConfigError, ValueError), match=next(iter(settings))):
        parse_part("optimizer", {"kind": "adamw", **settings})
