"""The meter on real training: equal numbers for every optimizer, and training that does not notice it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchstone.diagnose.updates import UpdateMeter
from torchstone.diagnose.updates.inputs import LayerInputs, linear_layers
from torchstone.errors import ConfigError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}


class Net(nn.Module):
    """An embedding, two linear layers, and a head that is the embedding."""

    def __init__(self, tied: bool = True, recomputed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.dropout, self.recomputed = nn.Dropout(0.1), recomputed
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens_bt: Tensor) -> Tensor:
        hidden = self.embed(tokens_bt)
        inner = checkpoint(self._inner, hidden, use_reentrant=True) if self.recomputed else self._inner(hidden)
        return self.head(hidden + inner)

    def _inner(self, hidden: Tensor) -> Tensor:
        return self.second(self.dropout(torch.relu(self.first(hidden))))


def tokens(step: int, part: int = 0) -> Tensor:
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(100 * step + part))


def training(net: Net, optimizer: torch.optim.Optimizer, steps: int, micro: int = 1, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(micro):
            batch = tokens(step, part)
            torch.manual_seed(1000 * step + part)
            F.cross_entropy(net(batch).flatten(0, 1), batch.flatten()).div(micro).backward()
        optimizer.step()


def measured(net: Net, optimizer: torch.optim.Optimizer, steps: int = 3, **settings: Any) -> UpdateMeter:
    meter = UpdateMeter(net, optimizer, **{"every": 1, **settings})
    training(net, optimizer, steps)
    return meter


def matrices(net: Net) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters() if value.dim() > 1}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_numbers_are_those_of_the_weights_before_and_after(name: str) -> None:
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    meter = UpdateMeter(net, optimizer, every=1)
    training(net, optimizer, 2)
    before = matrices(net)
    training(net, optimizer, 1, first=2)
    record, after = meter.records[-1], matrices(net)
    assert set(record["matrices"]) == set(before) == {"embed.weight", "first.weight", "second.weight"}
    square = moved = 0.0
    for matrix, old in before.items():
        old, new = old.double(), after[matrix].double()
        found = record["matrices"][matrix]
        assert found["l2"] == pytest.approx(float((new - old).norm()), rel=1e-5)
        assert found["rms"] == pytest.approx(float((new - old).square().mean().sqrt()), rel=1e-5)
        assert found["relative"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
        cosine = F.cosine_similarity(old.flatten(), new.flatten(), dim=0)
        assert found["angle"] == pytest.approx(math.acos(float(cosine)), rel=1e-4)
        rows = F.cosine_similarity(old, new, dim=1).clamp(max=1).arccos()
        torch.testing.assert_close(meter.neurons[matrix]["angle"], rows, rtol=1e-3, atol=1e-6)
        assert found["neuron_angle"] == pytest.approx(float(rows.mean()), rel=1e-3)
        square, moved = square + float(old.norm()) ** 2, moved + float((new - old).norm()) ** 2
    assert record["l2"] == pytest.approx(moved**0.5, rel=1e-5)
    assert record["relative"] == pytest.approx((moved / square) ** 0.5, rel=1e-5)
    angles = [found["angle"] for found in record["matrices"].values()]
    assert record["angle"] == pytest.approx(sum(angles) / 3, rel=1e-5)
    assert record["step"] == 3 and record["rate"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("rows", [20, 6])
def test_responses_are_measured_on_inputs_of_the_batch(tied: bool, recomputed: bool, rows: int) -> None:
    net = Net(tied, recomputed)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    net.dropout.p = 0.0
    meter = UpdateMeter(net, optimizer, every=1, rows=rows)
    training(net, optimizer, 1)
    before = matrices(net)
    kept = torch.linspace(0, 19, min(rows, 20), dtype=torch.float64).round().long()
    with torch.no_grad():
        hidden = net.embed(tokens(1)).flatten(0, 1)
        inner = torch.relu(net.first(hidden))
        last = hidden + net.second(inner)
    training(net, optimizer, 1, first=1)
    inputs = {"first.weight": hidden, "second.weight": inner, "embed.weight" if tied else "head.weight": last}
    found = meter.records[-1]["matrices"]
    assert {name for name in found if "rrc" in found[name]} == set(inputs)
    for name, x in inputs.items():
        x, delta = x[kept], matrices(net)[name] - before[name]
        exact = (x @ delta.T).norm() / (x @ before[name].T).norm()
        assert found[name]["rrc"] == pytest.approx(float(exact), rel=1e-4)
        each = (x @ delta.T).norm(dim=0) / (x @ before[name].T).norm(dim=0)
        torch.testing.assert_close(meter.neurons[name]["rrc"].float(), each, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_the_same_bit_for_bit(name: str) -> None:
    plain, watched = Net(), Net()
    training(plain, OPTIMIZERS[name](plain.parameters()), 7)
    optimizer = OPTIMIZERS[name](watched.parameters())
    meter = measured(watched, optimizer, 7, every=2, early=1, probe=lambda: watched(tokens(0)) + torch.rand(11))
    assert [record["step"] for record in meter.records] == [1, 3, 5, 7]
    for left, right in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(left, right)


def test_random_streams_are_put_back_after_a_probe() -> None:
    net = Net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    UpdateMeter(net, optimizer, every=1, probe=lambda: net(tokens(0)))
    for value in net.parameters():
        value.grad = torch.ones_like(value)
    torch.manual_seed(5)
    optimizer.step()
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_a_probe_and_the_training_pass_give_equal_numbers() -> None:
    found = []
    for probing in (False, True):
        net = Net()
        net.dropout.p = 0.0
        probe = (lambda net=net: net(tokens(0))) if probing else None
        found.append(measured(net, OPTIMIZERS["adamw"](net.parameters()), 1, probe=probe).records)
    assert found[0] == found[1]


def test_which_steps_are_measured_depends_on_their_number_alone() -> None:
    net = Net()
    meter = measured(net, OPTIMIZERS["sgd"](net.parameters()), 25, every=10, early=3)
    assert [record["step"] for record in meter.records] == [1, 2, 3, 11, 21]
    later = UpdateMeter(net, OPTIMIZERS["sgd"](net.parameters()), every=10, early=3, step=9)
    training(net, later.optimizer, 12)
    assert [record["step"] for record in later.records] == [11, 21]


def test_hooks_sit_on_layers_only_while_inputs_are_wanted() -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    meter = UpdateMeter(net, optimizer, every=3, early=0)

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in net.modules())

    counts = []
    for step in range(4):
        counts.append(hooks())
        training(net, optimizer, 1, first=step)
    assert counts == [3, 0, 0, 3]
    meter.close()
    training(net, optimizer, 3)
    assert len(meter.records) == 2 and hooks() == 0 and not optimizer._optimizer_step_pre_hooks


def test_copies_and_inputs_are_dropped_after_the_update() -> None:
    net = Net()
    meter = measured(net, OPTIMIZERS["sgd"](net.parameters()), 1, every=5, early=0)
    assert meter.records and not meter._before and meter._inputs.of(net.first.weight) is None


def test_evaluations_between_steps_are_not_looked_at() -> None:
    net = Net()
    inputs = LayerInputs(net, linear_layers(net, net.parameters()), 64)
    inputs.begin()
    with torch.no_grad():
        net(tokens(3))
    assert inputs.of(net.first.weight) is None
    net(tokens(4))
    net(tokens(5))  # a second micro-batch adds nothing
    inputs.end()
    assert torch.equal(inputs.of(net.first.weight), net.embed(tokens(4)).flatten(0, 1))


@pytest.mark.parametrize("mixer", ["attention", "differential", "hgrn2", "rglru", "local-attention", "moa"])
@pytest.mark.parametrize("projection", ["linear", "gained"])
def test_maps_that_a_mixer_computes_together_have_its_input(mixer: str, projection: str) -> None:
    from tiny import tiny_recipe

    from torchstone.recipe.load import load_recipe

    block = {"mixer": mixer, "projection": projection, "feedforward": {"kind": "swiglu", "hidden": 64}}
    recipe = load_recipe(tiny_recipe(), [f"model.block={block}"])
    model = recipe.model.build(20, 16, 0)
    read: dict[str, Tensor] = {}
    for name in ("mixer", "feedforward"):
        norm = getattr(model.blocks[0], f"{name}_norm")
        norm.register_forward_hook(lambda module, given, output, name=name: read.setdefault(name, output.detach()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = UpdateMeter(model, optimizer, every=1, metrics=("rrc",))
    before = matrices(model)
    model(torch.arange(20).view(2, 10)).hidden_btd.square().sum().backward()
    optimizer.step()
    found, after = meter.records[0]["matrices"], matrices(model)
    inner = {name for name in found if name.startswith("blocks.0") and name.split(".")[-2].startswith("w_")}
    assert inner and all("rrc" in found[name] for name in inner)
    fused = [
        name
        for name in inner
        if name.split(".")[-2] in ("w_q", "w_k", "w_v", "w_f", "w_i", "w_x", "w_y", "w_gate", "w_up")
    ]
    assert len(fused) >= 4
    for name in fused:
        x = read[name.split(".")[2]].flatten(0, 1)
        exact = (x @ (after[name] - before[name]).T).norm() / (x @ before[name].T).norm()
        assert found[name]["rrc"] == pytest.approx(float(exact), rel=1e-4), name


def test_accumulation_measures_the_whole_update() -> None:
    net = Net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    meter = UpdateMeter(net, optimizer, every=1, batch_size=8)
    before = matrices(net)
    training(net, optimizer, 1, micro=2)
    assert len(meter.records) == 1
    moved = sum(float((new - before[name]).norm()) ** 2 for name, new in matrices(net).items()) ** 0.5
    assert meter.records[0]["l2"] == pytest.approx(moved, rel=1e-5)


def test_groups_frozen_matrices_and_matrices_without_gradient() -> None:
    net = Net(tied=False)
    net.second.requires_grad_(False)
    idle = nn.Parameter(torch.ones(3, 3))
    net.register_parameter("idle", idle)
    net.register_parameter("outside", nn.Parameter(torch.ones(3, 3)))
    groups = [
        {"params": [net.embed.weight, idle], "lr": 1e-3},
        {"params": [*net.first.parameters(), *net.head.parameters(), *net.second.parameters()], "lr": 0.0},
    ]
    meter = measured(net, torch.optim.AdamW(groups, lr=1e-2), 6)
    record = meter.records[-1]
    assert set(record["matrices"]) == {"embed.weight", "idle", "first.weight", "head.weight"}
    assert record["rate"] == 1e-3 and record["matrices"]["embed.weight"]["l2"] > 0
    assert record["matrices"]["idle"] == {"l2": 0.0, "rms": 0.0, "relative": 0.0, "angle": 0.0, "neuron_angle": 0.0}
    assert record["matrices"]["first.weight"]["l2"] == 0.0 and record["matrices"]["first.weight"]["rrc"] == 0.0
    assert record["matrices"]["first.weight"]["snr"] > 0


def test_bf16_weights() -> None:
    net = Net().bfloat16()
    meter = measured(net, torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9), 3)
    before = matrices(net)
    training(net, meter.optimizer, 1, first=3)
    for name, found in meter.records[-1]["matrices"].items():
        old, new = before[name].double(), matrices(net)[name].double()
        assert found["l2"] == pytest.approx(float((new - old).norm()), rel=1e-4)
        assert found["rrc"] > 0 and found["snr"] >= 0


def test_conv1d_of_transformers_has_its_neurons_in_columns() -> None:
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D(4, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    meter = UpdateMeter(conv, optimizer, every=1)
    x, before = torch.randn(10, 3), conv.weight.detach().clone()
    conv(x).square().sum().backward()
    optimizer.step()
    delta = conv.weight.detach() - before
    found = meter.records[0]["matrices"]["weight"]
    assert found["rrc"] == pytest.approx(float((x @ delta).norm() / (x @ before).norm()), rel=1e-4)
    angles = F.cosine_similarity(before.double(), conv.weight.detach().double(), dim=0).arccos()
    torch.testing.assert_close(meter.neurons["weight"]["angle"], angles, rtol=1e-3, atol=1e-7)


def test_critical_batch_size_is_in_samples() -> None:
    net, other = Net(), Net()
    found = measured(net, OPTIMIZERS["adamw"](net.parameters()), 5, batch_size=8).records[-1]
    assert found["critical_batch"] == pytest.approx(8 / found["snr"], rel=1e-4)
    found = measured(other, OPTIMIZERS["adamw"](other.parameters()), 5).records[-1]
    assert found["critical_batch"] == pytest.approx(1 / found["snr"], rel=1e-4)


def test_adam_starts_at_its_rate_and_settles_below() -> None:
    """The two facts behind warmup: the first step moves every number by the rate, later ones by √((1-β)/(1+β)) of it."""
    value = nn.Parameter(torch.randn(200, 100, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.AdamW([value], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    net = nn.Module()
    net.register_parameter("value", value)
    meter = UpdateMeter(net, optimizer, every=1, metrics=("l2",))
    draw = torch.Generator().manual_seed(1)
    for _ in range(400):
        value.grad = torch.randn(value.shape, generator=draw)
        optimizer.step()
    sizes = meter.series("rms")["values"]
    assert sizes[0] == pytest.approx(1e-3, rel=1e-4)
    assert sum(sizes[200:]) / 200 == pytest.approx(1e-3 * math.sqrt(0.1 / 1.9), rel=0.02)
    assert meter.summary()["rms"].ratio > 2


@pytest.mark.parametrize("chosen", [("l2",), ("angle",), ("rrc",), ("snr",)])
def test_only_what_was_asked_for_is_recorded(chosen: tuple[str, ...]) -> None:
    names = {
        "l2": {"l2", "rms", "relative"},
        "angle": {"angle", "neuron_angle"},
        "rrc": {"rrc", "neuron_rrc"},
        "snr": {"snr", "critical_batch", "alignment"},
    }
    net = Net()
    record = measured(net, OPTIMIZERS["adamw"](net.parameters()), 5, metrics=chosen).records[-1]
    assert set(record) - {"step", "rate", "matrices"} == names[chosen[0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("l3",)}, "metrics are l2, angle, rrc, snr; given l3"),
        ({"metrics": ()}, "given none"),
        ({"every": 0}, "every >= 1"),
        ({"rows": 5000}, "1 to 4096 rows; given every=10, early=5, step=0, rows=5000"),
        ({"beta": 1.0}, r"beta lies in \[0, 1\)"),
        ({"batch_size": 0}, "batch_size is above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Mapping[str, Any], message: str) -> None:
    net = Net()
    with pytest.raises(ConfigError, match=message):
        UpdateMeter(net, OPTIMIZERS["sgd"](net.parameters()), **settings)


def test_another_models_optimizer_closures_and_sparse_gradients_are_refused() -> None:
    net = Net()
    with pytest.raises(ConfigError, match="updates no matrix of Net"):
        UpdateMeter(net, OPTIMIZERS["sgd"](Net().parameters()))
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    UpdateMeter(net, optimizer)
    with pytest.raises(ConfigError, match="given a closure"):
        optimizer.step(lambda: torch.tensor(0.0))
    sparse = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    UpdateMeter(sparse, optimizer)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="weight has a sparse gradient"):
        optimizer.step()
