"""Growth: it keeps the function when asked to, carries the optimizer, wakes new tokens, freezes old ones; what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.errors import CheckpointError, ConfigError
from torchstone.models.belief_state import BeliefStateConfig
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.models.growth import grow, pattention_layers, token_usage, usage_histogram
from torchstone.models.widen import widen
from torchstone.nn.projection.pattention import Pattention
from torchstone.optim.adamw import AdamWConfig
from torchstone.train.state import restore_model

VOCAB, LENGTH = 13, 16
BARE = {"kind": "layernorm", "scale": False, "bias": False}


def tokenformer(mode: str = "l2-norm-gelu", feedforward: Any = "pattention", **projection: Any) -> Decoder:
    mine = {"norm_mode": mode}
    if feedforward == "pattention":
        feedforward = {"kind": "pattention", "tokens": 40, **mine}
    return build(feedforward, {"kind": "pattention", "input_tokens": 20, "output_tokens": 24, **mine, **projection})


def build(feedforward: Any, projection: Any = "linear") -> Decoder:
    block = {"mixer": "attention", "feedforward": feedforward, "norm": BARE, "projection": projection}
    config = {"width": 32, "depth": 2, "head_dim": 8, "block": block}
    return DecoderConfig.model_validate(config).build(VOCAB, LENGTH, seed=0)


def optimizer_of(model: Decoder, decay: float = 0.1) -> torch.optim.AdamW:
    return AdamWConfig.model_validate({"learning_rate": 1e-2, "weight_decay": decay}).build(model)


def batch(seed: int = 0) -> Batch:
    tokens = torch.randint(VOCAB, (4, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def loss_of(model: Decoder, given: Batch) -> Tensor:
    return F.cross_entropy(model.logits(model(given.tokens_bt).hidden_btd).flatten(0, 1), given.targets_bt.flatten())


def train(model: Decoder, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, batch(step % 8)).backward()
        optimizer.step()


def trained(mode: str = "l2-norm-gelu") -> tuple[Decoder, torch.optim.AdamW]:
    model = tokenformer(mode)
    optimizer = optimizer_of(model)
    train(model, optimizer, 24)
    return model, optimizer


def values_of(model: Decoder) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# The function ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["l2-norm-gelu", "gelu-l2-norm", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_keys_and_a_fixed_scale_keep_the_function(mode: str, dtype: torch.dtype) -> None:
    model, _ = trained(mode)
    model.to(dtype)
    given = batch(99)
    with torch.no_grad():
        before = model.logits(model(given.tokens_bt).hidden_btd)
        reports = [grow(model, 2, batch=given), grow(model, 1.5, seed=1, batch=given)]
        after = model.logits(model(given.tokens_bt).hidden_btd)
    change = float((after - before).abs().max() / before.abs().max())
    assert change < (1e-6 if dtype == torch.float32 else 1e-14)
    assert all(report.change < 1e-6 and report.warning is None for report in reports)
    assert reports[1].sizes["blocks.0.mixer.w_q"] == (40, 60)


@pytest.mark.parametrize(("keys", "tau"), [("zero", "following"), ("random", "fixed"), ("random", "following")])
def test_other_choices_move_the_loss_and_the_report_says_so(keys: Any, tau: Any) -> None:
    model, _ = trained()
    given = batch(1)
    before = float(loss_of(model, given).detach())
    report = grow(model, 2, keys=keys, tau=tau, batch=given)
    assert report.loss == pytest.approx((before, float(loss_of(model, given).detach())), abs=1e-6)
    assert report.change > 0.01
    layer: Any = model.get_submodule("blocks.0.mixer.w_q")
    assert float(layer.tau) == pytest.approx(math.sqrt(40 if tau == "following" else 20))
    assert bool((layer.keys_nd[20:] == 0).all()) == (keys == "zero")


@pytest.mark.parametrize(("jump", "warned"), [(0.0, False), (9e-4, False), (2e-3, True), (-2e-3, True)])
def test_a_jump_of_the_loss_is_worth_a_warning(jump: float, warned: bool) -> None:
    report = dataclasses.replace(grow(tokenformer(), 2), loss=(2.5, 2.5 + jump))
    assert report.jump == pytest.approx(jump)
    assert (report.warning is not None) == warned
    if report.warning:
        assert f"{jump:+.4f} nats" in report.warning and "keys zero, tau fixed" in report.warning


def test_the_scale_that_follows_is_what_the_released_layer_computes() -> None:
    model, _ = trained()
    layer: Any = model.get_submodule("blocks.1.feedforward.memory")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    grow(model, 2, tau="following")
    scores = x @ layer.keys_nd.T
    wanted = F.gelu(scores / scores.norm(dim=-1, keepdim=True) * math.sqrt(80)) @ layer.values_ne
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


def test_new_random_values_are_those_of_a_new_model() -> None:
    model = tokenformer(input_tokens=20)
    grow(model, {"input": 2000}, keys="random")
    layer: Any = model.get_submodule("blocks.0.mixer.w_v")
    layer.requires_grad_(False)
    assert float(layer.keys_nd[20:].std()) == pytest.approx(0.02, rel=0.05)
    assert float(layer.values_ne[20:].std()) == pytest.approx(1 / math.sqrt(32), rel=0.05)


def test_the_softmax_is_refused_where_the_function_shall_stay_and_grows_otherwise() -> None:
    model, _ = trained("softmax")
    with pytest.raises(ConfigError, match="cannot grow without changing the function"):
        grow(model, 2)
    assert grow(model, 2, keys="random").change > 1e-3


def test_a_half_precision_model_grows() -> None:
    model = tokenformer().bfloat16()
    report = grow(model, 2)
    assert report.change == 0.0 or report.change < 0.01
    assert model.get_parameter("blocks.0.mixer.w_q.keys_nd").dtype == torch.bfloat16


# Learning -------------------------------------------------------------------------------------------


def test_new_tokens_learn_keys_first_and_then_values() -> None:
    model, optimizer = trained()
    grow(model, 2, optimizer=optimizer)
    layers = {name: (layer, layer.tokens // 2) for name, layer in pattention_layers(model).items()}
    loss_of(model, batch(50)).backward()
    for layer, old in layers.values():
        assert layer.keys_nd.grad is not None and layer.values_ne.grad is not None
        assert bool((layer.keys_nd.grad[old:].norm(dim=-1) > 0).all())
        assert bool((layer.values_ne.grad[old:] == 0).all())
    train(model, optimizer, 1, first=50)
    assert all(bool((layer.keys_nd[old:].norm(dim=-1) > 0).all()) for layer, old in layers.values())
    optimizer.zero_grad()
    loss_of(model, batch(51)).backward()
    for layer, old in layers.values():
        assert layer.values_ne.grad is not None and bool((layer.values_ne.grad[old:].norm(dim=-1) > 0).all())


def test_two_zeros_would_be_dead_and_are_refused() -> None:
    model = tokenformer()
    before = values_of(model)
    with pytest.raises(ConfigError, match="stay dead"):
        grow(model, 2, keys="zero", values="zero")
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    grow(model, 2)
    layer: Any = model.get_submodule("blocks.0.mixer.w_q")
    layer.values_ne.data[20:].zero_()  # the case that is refused, made by hand
    loss_of(model, batch()).backward()
    assert bool((layer.keys_nd.grad[20:] == 0).all()) and bool((layer.values_ne.grad[20:] == 0).all())


# The optimizer --------------------------------------------------------------------------------------


def test_moments_are_extended_by_zeros_and_all_else_is_kept() -> None:
    model, optimizer = trained()
    names = {id(value): name for name, value in model.named_parameters()}
    groups = [[names[id(value)] for value in group["params"]] for group in optimizer.param_groups]
    before = {names[id(value)]: copy.deepcopy(state) for value, state in optimizer.state.items()}
    report = grow(model, 2, optimizer=optimizer)
    assert report.optimizer_carried
    names = {id(value): name for name, value in model.named_parameters()}
    assert [[names[id(value)] for value in group["params"]] for group in optimizer.param_groups] == groups
    assert {names[id(value)] for value in optimizer.state} == set(before)
    for value, state in optimizer.state.items():
        old = before[names[id(value)]]
        assert torch.equal(state["step"], old["step"])
        for moment in ("exp_avg", "exp_avg_sq"):
            rows = len(old[moment])
            assert state[moment].shape == value.shape
            assert torch.equal(state[moment][:rows], old[moment])
            assert bool((state[moment][rows:] == 0).all())


def test_the_first_step_moves_old_tokens_as_if_nothing_had_grown() -> None:
    small, small_optimizer = trained()
    grown, optimizer = trained()
    grow(grown, 2, optimizer=optimizer)
    for model, its in ((small, small_optimizer), (grown, optimizer)):
        train(model, its, 1, first=7)
    for name, value in small.named_parameters():
        torch.testing.assert_close(grown.get_parameter(name)[: len(value)], value, rtol=1e-4, atol=1e-6)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = tokenformer(), tokenformer()
    with pytest.raises(ConfigError, match="does not hold blocks.0.mixer.w_q.keys_nd"):
        grow(model, 2, optimizer=optimizer_of(other))
    assert model.config == other.config


def test_frozen_tokens_do_not_move_at_all_under_decay() -> None:
    model, optimizer = trained()
    old = {name: layer.keys().detach().clone() for name, layer in pattention_layers(model).items()}
    report = grow(model, 2, freeze_old=True, optimizer=optimizer, batch=batch(9))
    assert report.change < 1e-6
    train(model, optimizer, 4, first=10)
    for name, layer in pattention_layers(model).items():
        assert layer.frozen == len(old[name]) and layer.tokens == 2 * layer.frozen
        assert torch.equal(layer.keys()[: layer.frozen], old[name])
        assert bool((layer.keys_nd != 0).all())
    assert not any("frozen" in name for name, value in model.named_parameters() if value.requires_grad)
    fresh = model.config.build(VOCAB, LENGTH, 0)
    restore_model(fresh, model.state_dict())
    assert float(loss_of(fresh, batch(9)).detach()) == float(loss_of(model, batch(9)).detach())


@pytest.mark.parametrize("again", [True, False])
def test_a_model_with_frozen_tokens_grows_again(again: bool) -> None:
    model, optimizer = trained()
    grow(model, 2, freeze_old=True, optimizer=optimizer)
    train(model, optimizer, 2, first=20)
    report = grow(model, 2, freeze_old=again, optimizer=optimizer, batch=batch(9))
    assert report.change < 1e-6
    layer: Any = model.get_submodule("blocks.0.mixer.w_q")
    assert (layer.tokens, layer.frozen) == (80, 40 if again else 20)
    frozen = layer.keys()[: layer.frozen].detach().clone()
    train(model, optimizer, 2, first=22)
    assert torch.equal(layer.keys()[: layer.frozen], frozen)


def test_new_tokens_beside_frozen_ones_are_no_copies_of_any() -> None:
    """With the model's own seed, and again with it: every random key and value is another one."""
    model = tokenformer()
    for _ in range(2):
        grow(model, 2, keys="random", freeze_old=True, seed=0)
    for layer in pattention_layers(model).values():
        for rows_nd in (layer.keys(), layer.values()):
            assert len(torch.unique(rows_nd[:, 0].detach())) == layer.tokens
    layer = model.get_submodule("blocks.0.mixer.w_v")
    assert isinstance(layer, Pattention)
    assert float(layer.keys_nd.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(layer.values_ne.detach().std()) == pytest.approx(1 / math.sqrt(32), rel=0.1)


def test_all_but_the_old_tokens_is_trained_beside_frozen_ones() -> None:
    model, optimizer = trained()
    grow(model, 2, freeze_old=True, optimizer=optimizer)
    before = values_of(model)
    train(model, optimizer, 3, first=10)
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == {name for name in before if ".frozen_" in name} and "embed.weight" in before


# Sizes and configuration ----------------------------------------------------------------------------


def test_sizes_by_use_and_by_pattern() -> None:
    model = tokenformer()
    report = grow(model, {"input": 30, "blocks.*.feedforward.*": 50})
    assert set(report.sizes.values()) == {(20, 30), (40, 50)} and len(report.sizes) == 8
    block = model.config.block
    assert (block.projection.input_tokens, block.projection.output_tokens, block.feedforward.tokens) == (30, 24, 50)  # type: ignore[attr-defined]
    gated = tokenformer(feedforward="swiglu")
    grow(gated, {"feedforward": 64})
    assert gated.config.block.projection.feedforward_tokens == 64  # type: ignore[attr-defined]


@pytest.mark.parametrize("freeze", [True, False])
def test_a_grown_checkpoint_loads_from_its_recipe_with_its_scale(freeze: bool) -> None:
    model, _ = trained()
    grow(model, 2, freeze_old=freeze)
    config = DecoderConfig.model_validate(model.config.model_dump(mode="json"))
    fresh = config.build(VOCAB, LENGTH, seed=5)
    assert float(fresh.get_buffer("blocks.0.mixer.w_q.tau")) == pytest.approx(math.sqrt(40))
    restore_model(fresh, model.state_dict())
    assert float(fresh.get_buffer("blocks.0.mixer.w_q.tau")) == pytest.approx(math.sqrt(20))
    assert torch.equal(fresh(batch().tokens_bt).hidden_btd, model(batch().tokens_bt).hidden_btd)


def test_a_checkpoint_without_scales_is_refused() -> None:
    model = tokenformer()
    tensors = {name: value for name, value in model.state_dict().items() if not name.endswith("tau")}
    with pytest.raises(CheckpointError, match="tau is missing"):
        restore_model(tokenformer(), tensors)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.5, "has 20 parameter tokens and 10 were asked for"),
        ({"output": 23}, "has 24 parameter tokens and 23 were asked for"),
        (1, "every layer has the tokens that were asked for"),
        ({"inputs": 30}, "'inputs' names no layer"),
        ({"blocks.0.*": 60}, "a recipe has one number for each use"),
    ],
)
def test_sizes_that_cannot_be(factor: Any, words: str) -> None:
    model = tokenformer()
    before = values_of(model)
    with pytest.raises(ConfigError, match=words):
        grow(model, factor)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("wrong", [{"keys": "nought"}, {"values": "nought"}, {"tau": "free"}])
def test_unknown_choices_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is 'nought'|is 'free'"):
        grow(tokenformer(), 2, **wrong)


def test_a_model_without_parameter_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter tokens"):
        grow(build("swiglu"), 2)


def test_a_model_of_two_encoders_grows() -> None:
    block = {"mixer": "attention", "feedforward": "pattention", "norm": BARE, "projection": "pattention"}
    config = BeliefStateConfig.model_validate({"width": 16, "depth": 1, "head_dim": 8, "block": block, "end_token": 0})
    model = config.build(VOCAB, LENGTH, seed=0)
    report = grow(model, 2)
    assert report.change < 1e-6
    assert {name.split(".")[0] for name in report.sizes} == {"blocks", "backward_encoder"}
    restore_model(model.config.build(VOCAB, LENGTH, 1), model.state_dict())


def test_the_report_counts_and_reads_well() -> None:
    model = tokenformer()
    parameters = sum(value.numel() for value in model.parameters())
    report = grow(model, 2)
    assert report.parameters == (parameters, sum(value.numel() for value in model.parameters()))
    assert report.flops_per_token[1] == 3 * model.flops(LENGTH) > report.flops_per_token[0]
    text = "\n".join(report.lines())
    assert "20 to 40 in 6 layers, 24 to 48 in 2 layers, 40 to 80 in 2 layers" in text
    assert "random tokens" in text and "none given" in text
    assert report.data()["sizes"]["blocks.0.mixer.w_o"] == [24, 48]


# Usage of tokens ------------------------------------------------------------------------------------


def test_usage_is_a_share_that_new_tokens_begin_without() -> None:
    model, optimizer = trained()
    grow(model, 2, optimizer=optimizer)
    for name, usage_n in token_usage(model, batch(3)).items():
        layer: Any = model.get_submodule(name)
        assert usage_n.shape == (layer.tokens,) and float(usage_n.mean()) == pytest.approx(1.0)
        assert bool((usage_n[layer.tokens // 2 :] == 0).all()) and bool((usage_n[: layer.tokens // 2] > 0).all())
        shares = usage_histogram(usage_n)
        assert float(shares.sum()) == pytest.approx(1.0) and float(shares[0]) == 0.5
    train(model, optimizer, 3, first=30)
    assert all(bool((usage_n > 0).all()) for usage_n in token_usage(model, batch(3)).values())


def test_usage_is_what_it_says() -> None:
    model = tokenformer()
    name, given = "blocks.0.mixer.w_q", batch(3)
    layer: Any = model.get_submodule(name)
    x_btd = model.blocks[0].mixer_norm(model.embed(given.tokens_bt))  # type: ignore[union-attr,operator]
    wanted = layer.weights(x_btd).abs().sum((0, 1)) * layer.values_ne.norm(dim=-1)
    torch.testing.assert_close(token_usage(model, given)[name], (wanted / wanted.mean()).detach())
    shares = usage_histogram(torch.tensor([0.0, 0.005, 0.01, 0.3, 5.0, 50.0, 10.0]))
    torch.testing.assert_close(shares, torch.tensor([2, 1, 1, 0, 0, 1, 2]) / 7)


# Hidden units ---------------------------------------------------------------------------------------


WIDE: dict[str, Any] = {
    "mlp": {"kind": "mlp", "hidden": 48},
    "mlp with biases": {"kind": "mlp", "hidden": 48, "bias": True},
    "swiglu": {"kind": "swiglu", "hidden": 48},
    "geglu": {"kind": "geglu", "hidden": 48},
}


@pytest.mark.parametrize("kind", WIDE)
def test_widening_keeps_the_function_and_the_optimizer_and_learns(kind: str) -> None:
    model = build(WIDE[kind])
    optimizer = optimizer_of(model)
    train(model, optimizer, 4)
    moments = {name: optimizer.state[value]["exp_avg"].clone() for name, value in model.named_parameters()}
    report = widen(model, 2, optimizer=optimizer, batch=batch(9))
    assert report.change < 1e-6 and set(report.sizes.values()) == {(48, 96)} and report.unit == "hidden units"
    for name, value in model.named_parameters():
        moment = optimizer.state[value]["exp_avg"]
        corner = tuple(slice(size) for size in moments[name].shape)
        assert moment.shape == value.shape and torch.equal(moment[corner], moments[name])
        assert float(moment.abs().sum()) == pytest.approx(float(moments[name].abs().sum()))
    train(model, optimizer, 2, first=10)
    module: Any = model.get_submodule("blocks.0.feedforward")
    last = module.get_submodule(module.residual_parameters()[0].removesuffix(".weight"))
    assert last.in_features == 96 and bool((last.weight[:, 48:] != 0).all())
    restore_model(model.config.build(VOCAB, LENGTH, 1), model.state_dict())


def test_widening_to_a_width_and_what_cannot_be_widened() -> None:
    model = build({"kind": "swiglu"})  # 8/3 of 32, rounded up to 88
    widen(model, hidden=100)
    assert model.config.block.feedforward.hidden == 100  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="has 100 hidden units and 50"):
        widen(model, 0.5)
    with pytest.raises(ConfigError, match="another projection than linear"):
        widen(build("mlp", "pattention"), 2)
    with pytest.raises(ConfigError, match="no feed-forward layer with hidden units"):
        widen(tokenformer(), 2)
    with pytest.raises(ConfigError, match="does not hold"):
        widen(model, 2, optimizer=optimizer_of(build("swiglu")))


def test_every_layer_of_the_test_model_is_made_of_tokens() -> None:
    kinds = {type(module).__name__ for module in tokenformer().modules()}
    assert "Linear" not in kinds and Pattention.__name__ in kinds


# Slips of the hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (math.nan, "the factor is nan"),
        (math.inf, "the factor is inf"),
        (-math.inf, "the factor is -inf"),
        (1e12, "would have .*,000,000,000,000 .*at most 10,000,000"),
    ],
)
def test_factors_that_no_one_means_are_refused(factor: float, words: str) -> None:
    gated, model = build({"kind": "swiglu", "hidden": 64}), tokenformer()
    for one, enlarge in ((gated, widen), (model, grow)):
        before = values_of(one)
        with pytest.raises(ConfigError, match=words):
            enlarge(one, factor)
        assert all(torch.equal(value, before[name]) for name, value in one.named_parameters())


def test_numbers_that_no_one_means_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.0\.mixer\.w_q would have 10,000,001 parameter tokens"):
        grow(tokenformer(), {"input": 10**7 + 1})
    with pytest.raises(ConfigError, match=r"blocks\.0\.feedforward would have 10,000,001 hidden units"):
        widen(build({"kind": "mlp", "hidden": 64}), hidden=10**7 + 1)
    with pytest.raises(ConfigError, match="has 64 hidden units and 0 were asked for"):
        widen(build({"kind": "mlp", "hidden": 64}), hidden=0)
