"""Rotational updates: rows keep their norms and turn by the angle asked for; the plain formula, exact state, refusals."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from updates import both_ways, needs_kernel

from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.models.growth import enlarge_parameter
from torchstone.optim import momentum_native
from torchstone.optim.lionar import LionAR, LionARConfig
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.rotational import Rotational, RotationalConfig
from torchstone.recipe.registry import parse_part
from torchstone.train.state import optimizer_tensors, restore_optimizer

INNER = ("adamw", "sgdm", "lion")
every_inner = pytest.mark.parametrize("inner", INNER)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(draw(*shape, seed=seed) * 0.1)


def run(optimizer: MomentumOptimizer, steps: range) -> None:
    """Steps with gradients that depend on the step and the place only."""
    for step in steps:
        for place, parameter in enumerate(value for group in optimizer.param_groups for value in group["params"]):
            parameter.grad = draw(*parameter.shape, seed=7000 + 1000 * step + place).to(parameter.dtype)
        optimizer.step()


def model() -> Decoder:
    config = DecoderConfig.model_validate(
        {"width": 16, "depth": 2, "head_dim": 8, "head": {"kind": "linear", "tied": False}}
    )
    return config.build(vocab_size=20, length=8, seed=0)


def turned(before: Tensor, after: Tensor) -> Tensor:
    """Angle of every row, in float64."""
    return torch.acos(torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1))


# The update -----------------------------------------------------------------------------------------------


def plain_update(w: Tensor, g: Tensor, kept: dict[str, Any], inner: str, settings: dict[str, Any]) -> Tensor:
    """The published formula, operation by operation, in float64."""
    kept["t"] += 1
    t, (b1, b2) = kept["t"], settings["betas"]
    if inner == "lion":
        d = torch.sign(b1 * kept["m"] + (1 - b1) * g)
        kept["m"] = b2 * kept["m"] + (1 - b2) * g
        theta = math.sqrt(math.pi * settings["lr"] * settings["decay"]) * math.sqrt(
            (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
        )
    elif inner == "adamw":
        kept["m"] = b1 * kept["m"] + (1 - b1) * g
        kept["v"] = b2 * kept["v"] + (1 - b2) * g * g
        d = kept["m"] / (1 - b1**t) / ((kept["v"] / (1 - b2**t)).sqrt() + 1e-8)
        theta = math.sqrt(2 * settings["lr"] * settings["decay"] * (1 - b1) / (1 + b1))
    else:
        d = kept["m"] = b1 * kept["m"] + g
        theta = math.sqrt(2 * settings["lr"] * settings["decay"] / (1 + b1))
    dims = (1,) if settings["per_neuron"] else (0, 1)
    norm = kept.setdefault("N", w.norm(dim=dims, keepdim=True))
    if settings["zero_mean"]:
        d = d - d.mean(dims, keepdim=True)
    d = d - w * (d * w).sum(dims, keepdim=True) / norm**2
    u = settings["u"]
    kept["q"] = u * kept["q"] + (1 - u) * d.norm(dim=dims, keepdim=True) ** 2
    w = w - theta * norm * d / ((kept["q"] / (1 - u**t)).sqrt() + 1e-8)
    return w * norm / w.norm(dim=dims, keepdim=True)


@every_inner
@both_ways
@pytest.mark.parametrize(
    "per_neuron, zero_mean, u", [(True, True, 0.9), (False, False, 0.5), (True, False, 0.0), (False, True, 0.9)]
)
def test_update_is_the_published_one(inner: Any, fused: bool, per_neuron: bool, zero_mean: bool, u: float) -> None:
    """300 columns, so that rows span several vectors of the kernel and a remainder."""
    parameter = weight(9, 301)
    shared = {"per_neuron": per_neuron, "zero_mean": zero_mean, "update_norm_decay": u}
    own = {"momentum": 0.8} if inner == "sgdm" else {"betas": (0.8, 0.95)}
    optimizer = Rotational([parameter], inner, lr=3e-2, weight_decay=0.4, fused=fused, **shared, **own)
    settings = {
        "lr": 3e-2,
        "decay": 0.4,
        "betas": (0.8, 0.95),
        "per_neuron": per_neuron,
        "zero_mean": zero_mean,
        "u": u,
    }
    zero = torch.zeros(9, 301, dtype=torch.float64)
    expected, kept = parameter.detach().double(), {"t": 0, "m": zero, "v": zero, "q": torch.zeros(())}
    for step in range(6):
        gradient = draw(9, 301, seed=step + 5)
        parameter.grad = gradient
        optimizer.step()
        expected = plain_update(expected, gradient.double(), kept, inner, settings)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=2e-6, rtol=1e-5)


@every_inner
@both_ways
def test_a_strict_rotation_turns_every_row_by_arctan_theta_and_keeps_its_norm(inner: Any, fused: bool) -> None:
    parameter = weight(12, 64)
    optimizer = Rotational([parameter], inner, lr=1e-2, weight_decay=1.0, update_norm_decay=0.0, fused=fused)
    norms, theta = parameter.detach().norm(dim=1), optimizer.angles()[0]
    assert theta is not None
    for step in range(5):
        before = parameter.detach().clone()
        run(optimizer, range(step, step + 1))
        torch.testing.assert_close(
            turned(before, parameter.detach()), torch.full((12,), math.atan(theta)).double(), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(parameter.detach().norm(dim=1), norms, rtol=2e-6, atol=0)


@needs_kernel
def test_the_kernel_is_used_and_equals_tensor_operations() -> None:
    assert momentum_native.library() is not None, "a machine with a C compiler runs this"
    ways = []
    for fused in (True, False):
        values = [weight(33, 129), weight(5, 4, 3, seed=1), weight(17, seed=2), nn.Parameter(torch.tensor(0.5))]
        run(Rotational(values, "adamw", lr=1e-2, fused=fused), range(4))
        ways.append(values)
    for kernel, tensors in zip(*ways, strict=True):
        torch.testing.assert_close(kernel, tensors, atol=1e-6, rtol=1e-5)


def test_without_a_compiler_tensor_operations_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(momentum_native, "library", lambda: None)
    found, expected = weight(8, 16), weight(8, 16)
    run(Rotational([found], "lion"), range(3))
    run(Rotational([expected], "lion", fused=False), range(3))
    assert torch.equal(found, expected)


def test_threads_do_not_change_the_result() -> None:
    """Large enough that the kernel shares the work out."""
    threads, ways = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            values = [weight(1500, 600), weight(700, 900, seed=1), weight(300, seed=2)]
            run(Rotational(values, "adamw"), range(2))
            ways.append(values)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*ways, strict=True))


def test_many_rows_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor operations on blocks of a few rows give what they give on whole tensors."""
    whole, blocks = weight(50, 40), weight(50, 40)
    run(Rotational([whole], fused=False), range(3))
    monkeypatch.setattr("torchstone.optim.momentum_update.BLOCK", 120)
    run(Rotational([blocks], fused=False), range(3))
    torch.testing.assert_close(blocks, whole, atol=1e-7, rtol=1e-6)


@every_inner
@both_ways
def test_vectors_take_the_inner_rules_own_step(inner: Any, fused: bool) -> None:
    vector, matrix = weight(6, seed=4), weight(3, 4)
    optimizer = Rotational([matrix, vector], inner, lr=1e-2, weight_decay=0.3, fused=fused)
    own = nn.Parameter(vector.detach().clone())
    if inner == "adamw":
        theirs: torch.optim.Optimizer = torch.optim.AdamW([own], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.3)
    elif inner == "sgdm":
        theirs = torch.optim.SGD([own], lr=1e-2, momentum=0.9, weight_decay=0.3)
    else:
        theirs = Rotational([own], "lion", lr=1e-2, weight_decay=0.3, rotational=False)
    for step in range(4):
        vector.grad, own.grad, matrix.grad = draw(6, seed=step), draw(6, seed=step), draw(3, 4, seed=step)
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(vector, own, atol=1e-6, rtol=1e-5)


@both_ways
def test_rows_without_gradient_stay_and_do_not_divide_by_zero(fused: bool) -> None:
    parameter = weight(4, 6)
    optimizer = LionAR([parameter], 1e-2, peak_lr=1e-2, bias_correction="none", fused=fused)
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(4, 6)
    parameter.grad[1] = 1.0
    parameter.grad[1, ::2] = -1.0
    optimizer.step()
    torch.testing.assert_close(parameter.detach()[[0, 2, 3]], before[[0, 2, 3]], rtol=1e-6, atol=0)
    assert float(turned(before, parameter.detach())[1]) > 1e-4


@both_ways
def test_a_direction_along_the_row_turns_nothing(fused: bool) -> None:
    """Centred rows of two values have no direction left; nothing is made of rounding."""
    parameter = weight(5, 2)
    optimizer = Rotational([parameter], "sgdm", lr=0.1, fused=fused)
    before = parameter.detach().clone()
    run(optimizer, range(3))
    torch.testing.assert_close(parameter.detach(), before, rtol=1e-5, atol=1e-7)


def test_the_linear_schedule_is_proportional_and_the_root_is_not() -> None:
    angles = {}
    for schedule, peak in (("linear", 1e-2), ("sqrt", None)):
        optimizer = Rotational([weight(3, 4)], lr=1e-2, angle_schedule=schedule, peak_lr=peak)
        found = []
        for share in (1.0, 0.25):
            optimizer.param_groups[0]["lr"] = 1e-2 * share
            found.append(optimizer.angles()[0])
        angles[schedule] = found
    assert angles["linear"][0] == pytest.approx(angles["sqrt"][0])
    assert angles["linear"][1] == pytest.approx(angles["linear"][0] / 4)
    assert angles["sqrt"][1] == pytest.approx(angles["sqrt"][0] / 2)


# Centring -------------------------------------------------------------------------------------------------


def test_construction_centres_rows_and_keeps_their_norms() -> None:
    parameter = nn.Parameter(draw(5, 8, seed=0) + 1)
    norms = parameter.detach().norm(dim=1)
    Rotational([parameter])
    torch.testing.assert_close(parameter.detach().mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(parameter.detach().norm(dim=1), norms)


def test_what_does_not_rotate_is_not_centred() -> None:
    values = [nn.Parameter(draw(5, 8, seed=0) + 1), nn.Parameter(torch.ones(8)), nn.Parameter(draw(2, 3, seed=1) + 1)]
    before = [value.detach().clone() for value in values]
    groups = [{"params": values[:2], "rotational": False}, {"params": values[2:], "zero_mean": False}]
    Rotational(groups)
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_building_again_for_trained_weights_changes_no_bit(dtype: torch.dtype) -> None:
    parameter = nn.Parameter((draw(30, 50, seed=0) + 0.3).to(dtype))
    run(Rotational([parameter], lr=0.5), range(20))
    before = parameter.detach().clone()
    Rotational([parameter])
    assert torch.equal(parameter, before)


# State ----------------------------------------------------------------------------------------------------


def make(kind: str, parameters: list[nn.Parameter]) -> MomentumOptimizer:
    if kind == "lionar":
        return LionAR(parameters, 1e-2, peak_lr=1e-2)
    return Rotational(parameters, kind, lr=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*INNER, "lionar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_state_round_trip_goes_on_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(weight(6, 10).to(dtype)), nn.Parameter(weight(4, seed=1).to(dtype))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        straight = fresh()
        run(make(kind, straight), range(9))
        first = fresh()
        optimizer = make(kind, first)
        run(optimizer, range(5))
        state = copy.deepcopy(optimizer.state_dict())
        second = fresh()
        resumed = make(kind, second)
        for value, stored in zip(second, first, strict=True):
            value.data.copy_(stored.data)
        resumed.load_state_dict(state)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))  # not centred again
        run(resumed, range(5, 9))
    assert all(torch.equal(one, other) for one, other in zip(straight, second, strict=True))


@pytest.mark.parametrize("kind", [*INNER, "lionar"])
def test_a_deep_copy_goes_on_alike(kind: str) -> None:
    optimizer = make(kind, [weight(6, 10)])
    run(optimizer, range(2))
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        run(one, range(2, 5))
    (first,), (second,) = (one.param_groups[0]["params"] for one in (optimizer, copied))
    assert first is not second and torch.equal(first, second)


def test_the_state_holds_norms_averages_and_counters() -> None:
    parameter = weight(6, 5, 4)
    optimizer = Rotational([parameter])
    norms = parameter.detach().flatten(1).norm(dim=1)
    run(optimizer, range(3))
    state = optimizer.state_dict()["state"][0]
    assert set(state) == {"step", "turns", "exp_avg", "exp_avg_sq", "row_norm", "row_square"}
    assert state["step"] == state["turns"] == 3 and state["row_norm"].shape == (6, 1, 1)
    torch.testing.assert_close(state["row_norm"].flatten(), norms)
    json.dumps(optimizer.state_dict()["param_groups"])


def test_sixteen_bit_weights_keep_state_in_fp32_through_a_load() -> None:
    parameter = nn.Parameter(weight(6, 5).bfloat16())
    optimizer = Rotational([parameter], lr=0.1)
    run(optimizer, range(2))
    other = Rotational([nn.Parameter(parameter.detach().clone())], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state_dict()["state"][0].items():
        stored = other.state_dict()["state"][0][key]
        assert (
            stored == value
            if isinstance(value, int)
            else (stored.dtype == torch.float32 and torch.equal(stored, value))
        )


def test_norms_of_sixteen_bit_weights_are_those_of_fp32() -> None:
    parameter = nn.Parameter(draw(3, 4096, seed=0).bfloat16())
    exact = parameter.detach().double().norm(dim=1)
    optimizer = Rotational([parameter], lr=0.1, zero_mean=False)
    run(optimizer, range(1))
    torch.testing.assert_close(optimizer.state[parameter]["row_norm"].flatten().double(), exact, rtol=1e-5, atol=0)


def test_a_rotation_below_the_resolution_of_the_weights_warns_once() -> None:
    coarse, fine = nn.Parameter(weight(4, 5).bfloat16()), weight(4, 5)
    with pytest.warns(UserWarning, match=r"turns parameter 0 of group 0 by .* torch.bfloat16 resolves"):
        optimizer = Rotational([coarse], lr=1e-5)
        run(optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(optimizer, range(1, 3))
        run(Rotational([fine], lr=1e-5), range(1))


def test_a_parameter_may_be_laid_out_in_any_order() -> None:
    plain, other = weight(6, 7), nn.Parameter(weight(6, 7).detach().t().contiguous().t())
    assert not other.is_contiguous()
    for value in (plain, other):
        run(Rotational([value]), range(3))
    torch.testing.assert_close(other, plain, atol=1e-6, rtol=0)


def test_a_parameter_that_has_grown_gets_new_norms() -> None:
    """As `models.growth` does it: a larger parameter in the old one's place, with moments extended by zeros."""
    made = nn.Linear(5, 4, bias=False)
    optimizer = Rotational(made.parameters())
    run(optimizer, range(2))
    enlarge_parameter(made, "weight", draw(6, 5, seed=3), optimizer)
    norms = made.weight.detach().norm(dim=1)
    run(optimizer, range(2, 4))
    torch.testing.assert_close(made.weight.detach().norm(dim=1), norms, rtol=2e-6, atol=0)
    assert optimizer.state[made.weight]["turns"] == 2 and optimizer.state[made.weight]["step"] == 4


@pytest.mark.parametrize("kind", [*INNER, "lionar"])
def test_a_checkpoint_round_trip_goes_on_bit_for_bit(kind: str) -> None:
    """Through the trainer's tensors and plain data, which pass through JSON."""
    first = [weight(6, 10), weight(4, seed=1)]
    optimizer = make(kind, first)
    run(optimizer, range(3))
    tensors, plain = optimizer_tensors(optimizer)
    second = [nn.Parameter(value.detach().clone()) for value in first]
    resumed = make(kind, second)
    restore_optimizer(resumed, {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(plain)))
    assert resumed.defaults == optimizer.defaults and resumed.defaults.keys() <= resumed.param_groups[0].keys()
    for one in (optimizer, resumed):
        run(one, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# Groups of a model ----------------------------------------------------------------------------------------


def turning_names(optimizer: MomentumOptimizer) -> set[str]:
    return {
        optimizer.name(value)
        for group in optimizer.param_groups
        for value in group["params"]
        if optimizer.rotates(group, value)
    }


@pytest.mark.parametrize("config", [RotationalConfig(), LionARConfig()], ids=lambda config: config.kind)
def test_by_default_matrices_rotate_but_embeddings_and_head(config: Any) -> None:
    made = model()
    matrices = {name for name, value in made.named_parameters() if value.dim() > 1}
    vocabulary = {"embed.weight", "head.project.weight"} & matrices
    assert len(vocabulary) == 2
    optimizer = config.build(made)
    assert turning_names(optimizer) == matrices - vocabulary
    decays = {
        optimizer.name(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]
    }
    assert {decays[name] for name in matrices} == {0.1}
    assert turning_names(config.model_copy(update={"rotate_embeddings": True}).build(model())) == matrices


def test_a_role_without_decay_does_not_rotate() -> None:
    config = parse_part("optimizer", {"kind": "lionar", "weight_decay": {"default": 0.1, "attention_qk": 0.0}})
    names = turning_names(config.build(model()))
    assert names and not any("w_q" in name or "w_k" in name for name in names)


def test_settings_reach_the_optimizer() -> None:
    given = {"inner": "lion", "betas": [0.8, 0.9], "per_neuron": False, "zero_mean": False, "update_norm_decay": 0.3,
             "angle_schedule": "linear", "learning_rate": 2e-3, "bias_correction": "rms"}  # fmt: skip
    group = parse_part("optimizer", {"kind": "rotational", **given}).build(model()).param_groups[0]
    expected = {"betas": (0.8, 0.9), "per_neuron": False, "zero_mean": False, "update_norm_decay": 0.3, "peak_lr": 2e-3,
                "angle_schedule": "linear", "lr": 2e-3, "bias_correction": "rms"}  # fmt: skip
    assert {name: group[name] for name in expected} == expected


def test_rate_and_decay_carry_over_from_adamw_and_clipping_does_not() -> None:
    previous = {
        "kind": "adamw",
        "learning_rate": 3e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.2,
        "clip": 1.0,
    }
    assert LionARConfig.inherit(previous) == {"learning_rate": 3e-3, "weight_decay": 0.2}
