"""Rates for any optimizer of torch: those of LambdaLR, saved and restored bit for bit, refused under another plan."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

from torchstone.errors import CheckpointError, ConfigError
from torchstone.optim.schedules.wsd_s import wsd_s
from torchstone.recipe.registry import kinds, parse_part

OPTIMIZERS = {
    "sgd": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "adamw": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr),
    "adamw-tensor-rate": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=torch.tensor(lr)),
    "groups": lambda model, lr: torch.optim.AdamW(
        [{"params": [model.weight], "lr": lr}, {"params": [model.bias], "lr": lr / 3}]
    ),
}


def plan(peak=None):
    return wsd_s(30, ends=[12], peak=peak, warmup=3, decay="25%")


def made(name, schedule, lr=0.01):
    """A small model from one seed, its optimizer and the schedule's rates."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Linear(4, 2)
    optimizer = OPTIMIZERS[name](model, lr)
    return model, optimizer, schedule.torch(optimizer)


def train(model, optimizer, rates, begin, end):
    """Updates `begin` … `end`-1 on data of the step; returns the rates that were used."""
    used = []
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        x_bd = torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        (model(x_bd) - x_bd[:, :2]).square().mean().backward()
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        rates.step()
    return used


@pytest.mark.parametrize(("name", "peak"), [*((name, None) for name in OPTIMIZERS), ("sgd", 0.02), ("adamw", 0.02)])
def test_a_restored_run_continues_bit_for_bit(name, peak):
    whole = made(name, plan(peak))
    used = train(*whole, 0, 30)
    begun = made(name, plan(peak))
    first = train(*begun, 0, 17)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in begun], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    restored = made(name, plan(peak))
    for part, state in zip(restored, states, strict=True):
        part.load_state_dict(state)
    assert first + train(*restored, 17, 30) == used
    for one, other in zip(whole[0].parameters(), restored[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", kinds("schedule"))
def test_every_kind_sets_the_rates_that_lambda_lr_sets(kind):
    schedule = parse_part("schedule", kind).build(20)
    one, other = (made("groups", schedule) for _ in range(2))
    expected = torch.optim.lr_scheduler.LambdaLR(other[1], schedule.factor)
    assert train(*one, 0, 20) == train(other[0], other[1], expected, 0, 20)
    assert one[2].get_last_lr() == expected.get_last_lr()


@pytest.mark.parametrize("name", ["sgd", "adamw-tensor-rate"])
def test_a_schedule_with_a_peak_gives_it_to_the_optimizer(name):
    schedule = plan(peak=0.5)
    used = train(*made(name, schedule, lr=0.125), 0, 30)
    assert [rates[0] for rates in used] == pytest.approx([schedule.lr(step) for step in range(30)], rel=1e-6)
    if name == "sgd":
        assert [rates[0] for rates in used] == [schedule.lr(step) for step in range(30)]


def test_a_peak_for_groups_of_different_rates_is_refused():
    with pytest.raises(ConfigError, match="has the peak 0.5, and the optimizer's groups have different rates"):
        made("groups", plan(peak=0.5))


def test_the_state_is_plain_data_and_sets_the_rate_at_once():
    model, optimizer, rates = made("sgd", plan())
    train(model, optimizer, rates, 0, 11)
    state = json.loads(json.dumps(rates.state_dict()))
    _, other, restored = made("sgd", plan())
    restored.load_state_dict(state)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.01 * plan().factor(11)
    assert restored.get_last_lr() == rates.get_last_lr()


def test_another_plan_is_refused_with_the_first_step_and_both_rates():
    model, optimizer, rates = made("sgd", plan())
    train(model, optimizer, rates, 0, 11)
    other = made("sgd", wsd_s(30, ends=[12], warmup=3, decay=5))[2]
    with pytest.raises(ConfigError, match="rate of step 7 changes from 0.01 to 0.0035.*, and 11 steps were done"):
        other.load_state_dict(rates.state_dict())
    assert other.last_epoch == 0
    later = made("sgd", wsd_s(30, ends=[12], warmup=3, decay="25%").extend(60))[2]
    later.load_state_dict(rates.state_dict())
    assert later.last_epoch == 11
    with pytest.raises(ConfigError, match="rate of step 1 changes from 0.0033.* to 0.0066.*, and 11 steps were done"):
        made("sgd", plan(), lr=0.02)[2].load_state_dict(rates.state_dict())


def test_states_of_other_schedulers_and_groups_are_refused():
    rates = made("sgd", plan())[2]
    lambdas = torch.optim.lr_scheduler.LambdaLR(made("sgd", plan())[1], plan().factor)
    with pytest.raises(
        CheckpointError, match="no state of a schedule: it holds .*base_lrs.* needs done, peaks and plan"
    ):
        rates.load_state_dict(lambdas.state_dict())
    with pytest.raises(CheckpointError, match="of 2 parameter groups, and the optimizer has 1"):
        rates.load_state_dict(made("groups", plan())[2].state_dict())
