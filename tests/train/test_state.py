"""P3: optimizer and model go through a checkpoint and continue bit for bit; what does not fit is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchstone.errors import CheckpointError
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.state import optimizer_tensors, restore_model, restore_optimizer

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)),
    "adamw fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "adamw amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, foreach=True),
    "sgd with momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2),
}


class Tied(nn.Module):
    """A model with two names for one weight, a buffer, and a parameter that gets no gradient."""

    def __init__(self, width=6):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


def build(optimizer, seed=0, **options):
    torch.manual_seed(seed)
    model = Tied(**options)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, OPTIMIZERS[optimizer](groups)


def advance(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 10, (4, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten().flip(0))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()


def save(store, model, optimizer, step):
    tensors, plain = optimizer_tensors(optimizer)
    groups = {"model": dict(model.state_dict()), "optimizer": tensors}
    store.save(Snapshot(step, groups, {"optimizer": plain}))


def restore(store, model, optimizer):
    snapshot = store.load()
    restore_model(model, snapshot.tensors["model"])
    restore_optimizer(optimizer, snapshot.tensors["optimizer"], snapshot.data["optimizer"])


def same(left, right):
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_interrupted_twice_equals_uninterrupted(tmp_path, name):
    whole_model, whole_optimizer = build(name)
    advance(whole_model, whole_optimizer, range(9))
    store = CheckpointStore(tmp_path)
    model, optimizer = build(name)
    for start in (0, 3, 6):
        if start:
            model, optimizer = build(name, seed=start)  # other weights, which must all be replaced
            restore(store, model, optimizer)
        advance(model, optimizer, range(start, start + 3))
        save(store, model, optimizer, start + 3)
    assert same(dict(model.state_dict()), dict(whole_model.state_dict()))
    assert same(optimizer.state_dict(), whole_optimizer.state_dict())
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("name", ["adamw", "adamw fused"])
def test_low_precision_parameters_keep_their_moments(tmp_path, name):
    model, optimizer = build(name)
    model.bfloat16()
    advance(model, optimizer, range(3))
    save(CheckpointStore(tmp_path), model, optimizer, 3)
    other, fresh = build(name, seed=1)
    other.bfloat16()
    restore(CheckpointStore(tmp_path), other, fresh)
    assert same(fresh.state_dict(), optimizer.state_dict())


def test_before_the_first_step(tmp_path):
    model, optimizer = build("adamw")
    save(CheckpointStore(tmp_path), model, optimizer, 0)
    other, fresh = build("adamw", seed=1)
    restore(CheckpointStore(tmp_path), other, fresh)
    assert fresh.state_dict()["state"] == {}


def test_restored_state_does_not_share_memory_with_the_checkpoint(tmp_path):
    model, optimizer = build("adamw")
    advance(model, optimizer, range(2))
    tensors, plain = optimizer_tensors(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other, fresh = build("adamw")
    restore_optimizer(fresh, kept, copy.deepcopy(plain))
    before = {name: tensor.clone() for name, tensor in kept.items()}
    advance(other, fresh, range(2))
    assert same(kept, before)


def _stored():
    model, optimizer = build("adamw")
    advance(model, optimizer, range(2))
    return optimizer_tensors(optimizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("0.exp_avg", torch.zeros(3, 3)),
        ("0.exp_avg_sq", torch.zeros(10, 7)),
        ("0.exp_avg", torch.zeros(10, 6, dtype=torch.float64)),
        ("99.exp_avg", torch.zeros(1)),
        ("x.exp_avg", torch.zeros(1)),
        ("-1.exp_avg", torch.zeros(1)),
        ("", torch.zeros(1)),
        ("٣.exp_avg", torch.zeros(4, 4)),
    ],
)
def test_optimizer_state_that_does_not_fit_is_named(name, value):
    tensors, plain = _stored()
    _, fresh = build("adamw")
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        restore_optimizer(fresh, {**tensors, name: value}, plain)
    assert same(fresh.state_dict(), before)


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"state": {}, "param_groups": []},
        {"state": [], "param_groups": []},
        {"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]},
        {"state": {}, "param_groups": [1, 2]},
        {"state": {}, "param_groups": None},
    ],
)
def test_other_groups_are_refused(plain):
    _, fresh = build("adamw")
    with pytest.raises(CheckpointError, match="other parameter groups"):
        restore_optimizer(fresh, {}, plain)


def test_a_model_that_does_not_fit_is_described_and_left_alone():
    model, _ = build("adamw")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = dict(state)
    del wrong["norm.bias"]
    wrong["extra"] = torch.zeros(1)
    wrong["norm.weight"] = torch.zeros(7)
    wrong["idle"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(CheckpointError) as caught:
        restore_model(model, wrong)
    for part in (
        "norm.bias is missing",
        "extra is unknown",
        "norm.weight is torch.float32 (7,)",
        "idle is torch.float64",
    ):
        assert part in str(caught.value)
    assert same(dict(model.state_dict()), state)
