"""The examples of docs/optimizers.md run as they stand there."""

from __future__ import annotations

import math

import torch
from torch import nn

import torchstone
from torchstone.optim.lionar import LionAR as BuiltLionAR


def test_usable_with_any_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50))
    tokens = torch.randint(50, (8, 12))

    def loss_of() -> torch.Tensor:
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())

    # start: groups
    from torchstone.optim.lionar import LionAR

    groups = [
        {"params": [("hidden.weight", model[1].weight), ("hidden.bias", model[1].bias)]},
        {
            "params": [("embed", model[0].weight), ("head", model[2].weight), ("head.bias", model[2].bias)],
            "rotational": False,
        },
    ]
    optimizer = LionAR(groups, lr=3e-3, weight_decay=0.1, beta=0.98, peak_lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
    # end: groups
    norms, first = model[1].weight.detach().norm(dim=1), float(loss_of().detach())
    # start: step
    for _ in range(100):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
        schedule.step()
    # end: step
    torch.testing.assert_close(model[1].weight.detach().norm(dim=1), norms, rtol=1e-5, atol=0)
    assert float(loss_of().detach()) < first
    # start: angles
    optimizer.param_groups[0]["lr"] = 3e-3
    theta, _ = optimizer.angles()  # radians per step of each group; None where nothing rotates
    # end: angles
    assert theta is not None and math.isclose(theta, math.sqrt(2 * 3e-3 * 0.1) * math.sqrt(0.02 / 1.98))


def test_wrapper_and_limiter() -> None:
    model = nn.Linear(8, 4)
    # start: wrapper
    from torchstone.optim.rotational import Rotational

    rotational = Rotational(model.parameters(), inner="sgdm", lr=0.1, momentum=0.9, weight_decay=1e-2)
    # end: wrapper
    # start: limiter
    from torchstone.optim.rrc import RRCLimiter

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    limiter = RRCLimiter(optimizer, batch_size=64)
    model(torch.randn(64, 8)).square().mean().backward()
    optimizer.step()
    factors = limiter.factors()  # ρ of every parameter at the last step
    # end: limiter
    assert factors[model.weight] == 1 / 8
    rotational.step()


def test_the_recipe() -> None:
    # start: recipe
    recipe = torchstone.load_recipe(
        "recipes/tiny.yaml",
        ["optimizer={kind: lionar, beta: 0.98, bias_correction: inverse}", "model.block.projection=gained"],
    )
    model = recipe.model.build(vocab_size=1024, length=128, seed=0)
    optimizer = recipe.optimizer.build(model)
    rotating = [
        optimizer.name(p) for group in optimizer.param_groups for p in group["params"] if optimizer.rotates(group, p)
    ]
    # end: recipe
    assert isinstance(optimizer, BuiltLionAR) and recipe.optimizer.learning_rate == 3e-3
    assert "blocks.0.mixer.w_q.weight" in rotating and "embed.weight" not in rotating
