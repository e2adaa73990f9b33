"""What docs/schedules.md shows, executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from torchstone.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_a_plan_from_python(tmp_path):
    folder = tmp_path
    # start: plan
    from torchstone.optim.schedules.wsd_s import wsd_s

    schedule = wsd_s(50_000, ends=[12_500, 25_000], peak=6e-4, warmup=2000, decay="10%", decay_of="budget")
    schedule.lr(30_000)  # 6e-4
    schedule.checkpoints()  # (12500, 25000, 50000): states after that many updates
    schedule.plot(folder / "plan.svg", "WSD-S, three budgets")
    longer = schedule.extend(100_000)  # one cycle more; no rate that was used changes
    # end: plan
    assert (schedule.lr(30_000), schedule.checkpoints()) == (6e-4, (12_500, 25_000, 50_000))
    assert longer.checkpoints()[-1] == 100_000
    assert (folder / "plan.svg").read_text() == (DOCS / "schedules.svg").read_text()


def test_rates_of_any_optimizer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
    # start: torch
    from torchstone.optim.schedules.wsd_s import wsd_s

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rates = wsd_s(100, cycles=2, warmup=5).torch(optimizer)  # without a peak: of every group's own rate
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        rates.step()
    state = rates.state_dict()

    other = wsd_s(100, cycles=2, warmup=5, decay="30%").torch(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="rate of step 35 changes from 0.1 to 0.0625, and 60 steps were done"):
        other.load_state_dict(state)
    # end: torch
    assert state["done"] == 60


def test_protocols_and_their_cost():
    # start: protocols
    from torchstone.optim.schedules.protocols import protocol

    found = protocol("wsd", [750, 1500, 3000], warmup=50, decay=0.1, equal="compute")
    [found.spent(budget) for budget in range(3)]  # [750, 1500, 3000]
    [found.behind(budget) for budget in range(3)]  # [750, 1425, 2775]: earlier decays were thrown away
    [(s.parent, s.begin, s.end, s.serves) for s in found.segments][:2]  # [(None, 0, 675, None), (0, 675, 750, 0)]
    # end: protocols
    assert [found.spent(budget) for budget in range(3)] == [750, 1500, 3000]
    assert [found.behind(budget) for budget in range(3)] == [750, 1425, 2775]
    assert [(s.parent, s.begin, s.end, s.serves) for s in found.segments][:2] == [
        (None, 0, 675, None),
        (0, 675, 750, 0),
    ]
