"""Pattention: its formula and gradients, zeros, half precision, sizes per use, frozen tokens, and every place that takes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.counts import Counts, count
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.context import BuildContext
from torchstone.nn.projection.pattention import UNUSED, Pattention, PattentionConfig
from torchstone.optim.adamw import AdamWConfig
from torchstone.recipe.registry import parse_part

MODES = ("l2-norm-gelu", "gelu-l2-norm", "softmax", "none")
every_mode = pytest.mark.parametrize("mode", MODES)
every_gelu = pytest.mark.parametrize("gelu", ["exact", "tanh"])


def layer(mode: str = "l2-norm-gelu", sizes: tuple[int, int, int] = (6, 5, 9), **settings: Any) -> Pattention:
    """inputs, outputs, tokens, with weights of a size that makes a test sharp."""
    made = Pattention(PattentionConfig(norm_mode=mode, **settings), *sizes, frozen=0, value_std=1.0, use="input")  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter.data.normal_(generator=draw)
    made.fill_buffers()
    return made


def used(mode: str, **settings: Any) -> dict[str, Any]:
    """Of the settings those that the mode uses."""
    return {name: value for name, value in settings.items() if name not in UNUSED[mode]}


def inputs(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(made: Pattention, x: Tensor) -> Tensor:
    """The formula, operation by operation."""
    scores, tau = x @ made.keys().T, made.tau.to(x.dtype)
    approximate = "none" if made.settings.gelu == "exact" else "tanh"
    eps = made.settings.eps
    match made.settings.norm_mode:
        case "l2-norm-gelu":
            normed = tau * scores / (scores.pow(2).sum(-1, keepdim=True) + eps).sqrt()
            weights = F.gelu(normed, approximate=approximate)
        case "gelu-l2-norm":
            weights = F.gelu(scores, approximate=approximate)
            weights = tau * weights / (weights.pow(2).sum(-1, keepdim=True) + eps).sqrt()
        case "softmax":
            weights = made.tokens * scores.softmax(-1)
        case _:
            weights = F.gelu(scores, approximate=approximate)
    return weights @ made.values()


@every_mode
@every_gelu
def test_it_is_its_formula_and_so_are_its_gradients(mode: str, gelu: str) -> None:
    made = layer(mode, **used(mode, gelu=gelu)).double()
    made.tau.fill_(3.0)  # √9, without fp32's rounding of other roots
    x = inputs(2, 3, 6).requires_grad_()
    weight = inputs(2, 3, 5, seed=8)
    wanted = torch.autograd.grad((plain(made, x) * weight).sum(), [x, *made.parameters()])
    y = made(x)
    torch.testing.assert_close(y, plain(made, x), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((y * weight).sum(), [x, *made.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@every_mode
@every_gelu
def test_gradients_agree_with_finite_differences(mode: str, gelu: str) -> None:
    made = layer(mode, (3, 2, 4), **used(mode, gelu=gelu, eps=1e-2)).double()
    keys, values = made.keys_nd.detach().requires_grad_(), made.values_ne.detach().requires_grad_()

    def run(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"keys_nd": k, "values_ne": v}, (x,))

    assert torch.autograd.gradcheck(run, (inputs(3, 3).requires_grad_(), keys, values), atol=1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_a_second_derivative_is_refused_and_not_wrong(trained: bool) -> None:
    made, x = layer().requires_grad_(trained), inputs(2, 6).float().requires_grad_()
    loss = x.square().sum() + made(x).sum()  # the square alone has a second derivative
    with pytest.raises(ConfigError, match="l2-norm-gelu has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("mode", ["gelu-l2-norm", "softmax", "none"])
def test_other_modes_have_a_second_derivative(mode: str) -> None:
    made = layer(mode, (3, 2, 4)).double().requires_grad_(False)
    assert torch.autograd.gradgradcheck(made, inputs(3, 3).requires_grad_())


@pytest.mark.parametrize(
    ("mode", "name", "value"),
    [("none", "tau", 2.0), ("none", "eps", 1e-3), ("softmax", "eps", 1e-3), ("softmax", "gelu", "tanh")],
)
@pytest.mark.parametrize("family", ["projection", "feedforward"])
def test_settings_without_effect_are_refused(family: str, mode: str, name: str, value: Any) -> None:
    part = {"kind": "pattention", "norm_mode": mode}
    with pytest.raises(ValidationError, match=f"norm_mode {mode} does not use {name}, and {value} was given"):
        parse_part(family, {**part, name: value})
    whole: Any = parse_part(family, part)
    assert parse_part(family, whole.model_dump()) == whole


@every_mode
def test_settings_that_a_mode_uses_have_an_effect(mode: str) -> None:
    x = inputs(4, 6).float()
    for name, value in used(mode, tau=2.0, eps=1.0, gelu="tanh").items():
        assert not torch.equal(layer(mode, **{name: value})(x), layer(mode)(x)), name


@every_mode
def test_an_empty_batch_passes_through(mode: str) -> None:
    made, x = layer(mode).float(), torch.zeros(0, 4, 6, requires_grad=True)
    made(x).sum().backward()
    assert made(x).shape == (0, 4, 5) and made.keys_nd.grad is not None and not made.keys_nd.grad.any()


def test_tokens_of_a_feedforward_have_no_effect_beside_one_with_sizes_of_its_own() -> None:
    for feedforward, changes in (("smoe", False), ("pattention", False), ("swiglu", True), ("mlp", True)):
        few, many = (
            sum(p.numel() for p in decoder({"kind": "pattention", "feedforward_tokens": n}, feedforward).parameters())
            for n in (5, 9)
        )
        assert (few != many) == changes


@pytest.mark.parametrize("scale", [1e-2, 1e3, 1e8])
def test_the_scale_of_the_scores_has_no_effect(scale: float) -> None:
    made, x = layer(eps=1e-30), inputs(4, 6).float()
    torch.testing.assert_close(made(scale * x), made(x), rtol=2e-5, atol=1e-6)


@every_mode
def test_a_row_of_zeros_gives_zeros_and_finite_gradients(mode: str) -> None:
    made, x = layer(mode), inputs(3, 6).float()
    x[1] = 0.0
    x.requires_grad_()
    y = made(x)
    if mode != "softmax":  # whose weights are then all 1
        assert bool((y[1] == 0).all())
    y.sum().backward()
    for value in (y, x.grad, made.keys_nd.grad, made.values_ne.grad):
        assert value is not None and bool(value.isfinite().all())


def test_one_token_is_a_sign() -> None:
    made, x = layer(sizes=(2, 3, 1), eps=1e-20), inputs(4, 2).float()
    signs = (x @ made.keys_nd.T).sign()
    torch.testing.assert_close(made(x), F.gelu(signs) @ made.values_ne, rtol=1e-5, atol=1e-6)


@every_mode
def test_half_precision_is_near_and_keeps_the_scale(mode: str) -> None:
    made, x = layer(mode, (64, 32, 100)), inputs(8, 64).float()
    made.tau.fill_(10.01)
    wanted = made(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = made(x)
    mixed.float().sum().backward()
    assert made.keys_nd.grad is not None and made.keys_nd.grad.dtype == torch.float32
    made.bfloat16()
    assert made.tau.dtype == torch.float32 and float(made.tau) == pytest.approx(10.01)
    for y in (mixed, made(x.bfloat16())):
        assert y.dtype == torch.bfloat16
        assert float((y.detach().float() - wanted).norm() / wanted.norm()) < 0.03
    assert made.double().tau.dtype == torch.float64


def test_scores_that_overflow_half_precision_when_squared_are_normalised() -> None:
    made, x = layer(sizes=(4, 3, 5)), 1e4 * inputs(3, 4).float()
    y = made.half()(x.half())
    assert bool(y.isfinite().all()) and bool((y != 0).any())


def test_the_scale_is_a_stored_buffer() -> None:
    model = decoder({"kind": "pattention", "input_tokens": 5, "output_tokens": 7})
    scales = {name: float(value) for name, value in model.state_dict().items() if name.endswith(".tau")}
    assert scales["blocks.0.mixer.w_q.tau"] == pytest.approx(math.sqrt(5))
    assert scales["blocks.0.mixer.w_o.tau"] == pytest.approx(math.sqrt(7))
    assert float(layer(tau=0.25).tau) == 0.25


def decoder(
    projection: Any = "pattention", feedforward: Any = "pattention", mixer: Any = "attention", **more: Any
) -> Decoder:
    block = {"mixer": mixer, "feedforward": feedforward, "norm": "layernorm", "projection": projection}
    config = {"width": 32, "depth": 2, "head_dim": 8, "block": block, **more}
    return DecoderConfig.model_validate(config).build(vocab_size=11, length=12, seed=0)


def test_sizes_are_chosen_by_use() -> None:
    sizes = {"kind": "pattention", "input_tokens": 5, "output_tokens": 7, "feedforward_tokens": 9}
    model = decoder(sizes, "swiglu")
    found = {name: module.tokens for name, module in model.named_modules() if isinstance(module, Pattention)}
    assert {name.rpartition(".")[2]: tokens for name, tokens in found.items()} == {
        "w_q": 5, "w_k": 5, "w_v": 5, "w_o": 7, "w_gate": 9, "w_up": 9, "w_down": 9,
    }  # fmt: skip
    unset = decoder("pattention", "swiglu")
    assert {module.tokens for module in unset.modules() if isinstance(module, Pattention)} == {32}
    assert {b.feedforward.memory.tokens for b in decoder().blocks} == {128}  # type: ignore[union-attr]


def test_initial_values_are_those_of_the_released_code() -> None:
    model = decoder("pattention", {"kind": "pattention", "tokens": 4096})
    memory: Any = model.blocks[0].feedforward.memory.requires_grad_(False)  # type: ignore[union-attr]
    assert float(memory.keys_nd.std()) == pytest.approx(0.02, rel=0.02)
    assert float(memory.values_ne.std()) == pytest.approx(2 / (2 * math.sqrt(32)), rel=0.02)


def test_a_layer_of_the_paper_has_16_squares_of_the_width() -> None:
    layers = [module for module in decoder().blocks[0].modules() if isinstance(module, Pattention)]
    assert sum(parameter.numel() for one in layers for parameter in one.parameters()) == 16 * 32**2


def test_counts_agree_with_a_counter_of_flops() -> None:
    for mode in MODES:
        made, x = layer(mode, sizes=(6, 5, 9)), inputs(7, 6).float().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = made(x)
        assert counter.get_total_flops() == 7 * made.flops() == 7 * 2 * 9 * 11
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * 7 * made.flops()
    assert layer(sizes=(6, 5, 9)).activation_values() == 6 + 5 + 18


def test_a_model_counts_its_parameter_tokens() -> None:
    def counts(tokens: int) -> Counts:
        part = {"kind": "pattention", "input_tokens": tokens, "output_tokens": 24}
        return count(decoder(part, {"kind": "pattention", "tokens": 40}).config, 11, 12)

    few, many = counts(20), counts(21)  # one token more in q, k and v of two layers, 32 + 32 channels each
    assert many.parameters - few.parameters == 6 * 64
    assert many.forward_flops_per_token - few.forward_flops_per_token == 2 * 6 * 64
    assert many.activation_values_per_token - few.activation_values_per_token == 2 * 6


def test_biases_that_attention_asks_for_are_honoured() -> None:
    model = decoder(mixer={"kind": "attention", "qkv_bias": True, "output_bias": True})
    mixer: Any = model.blocks[0].mixer  # type: ignore[union-attr]
    assert {name for name, _ in mixer.named_parameters() if "bias" in name} == {
        f"{name}.bias" for name in ("w_q", "w_k", "w_v", "w_o")
    }
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    before = mixer.w_o(x)
    mixer.w_o.bias.data.fill_(0.5)
    torch.testing.assert_close(mixer.w_o(x), before + 0.5)


def test_frozen_tokens_have_no_gradient_and_take_part() -> None:
    whole = layer(sizes=(6, 5, 9))
    split = Pattention(PattentionConfig(), 6, 5, 9, 4, 1.0, "input")
    split.fill_buffers()
    split.load_state_dict({
        "frozen_keys_nd": whole.keys_nd[:4], "keys_nd": whole.keys_nd[4:], "frozen_values_ne": whole.values_ne[:4],
        "values_ne": whole.values_ne[4:], "tau": whole.tau,
    })  # fmt: skip
    x = inputs(3, 6).float()
    for one in (whole, split):
        one(x).square().sum().backward()
    assert torch.equal(split(x), whole(x))
    assert split.frozen_keys_nd.grad is None and split.frozen_values_ne.grad is None
    torch.testing.assert_close(split.keys_nd.grad, whole.keys_nd.grad[4:])  # type: ignore[index]
    with pytest.raises(ConfigError, match="leave at least one"):
        Pattention(PattentionConfig(), 6, 5, 9, 9, 1.0, "input")


def test_a_compiled_layer_is_the_same() -> None:
    made, x = layer().float(), inputs(4, 6).float().requires_grad_()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for run in (made, compiled):
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(plain(made, x).square().sum(), x)[0])


@pytest.mark.parametrize("view", ["transposed", "strided", "row"])
def test_inputs_in_any_layout(view: str) -> None:
    made, base = layer(), inputs(4, 6, 6).float()
    x = {"transposed": base.transpose(0, 1), "strided": base[:, ::2], "row": base[0, 0]}[view]
    wanted = made(x.contiguous())
    torch.testing.assert_close(made(x.detach().requires_grad_()), wanted)


def train_one_step(model: Decoder) -> None:
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(1))
    optimizer = AdamWConfig(learning_rate=1e-2).build(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.train()
    output = model(tokens)
    loss = F.cross_entropy(model.logits(output.hidden_btd).flatten(0, 1), tokens.roll(-1, 1).flatten())
    if output.auxiliary is not None:
        loss = loss + output.auxiliary
    loss.backward()
    optimizer.step()
    still = [
        name
        for name, value in model.named_parameters()
        if ("keys_nd" in name or "values_ne" in name) and torch.equal(value, before[name])
    ]
    assert still == []


MIXERS: dict[str, Any] = {
    "attention": "attention",
    "differential-v1": {"kind": "differential", "version": "v1"},
    "differential-v2": {"kind": "differential", "version": "v2"},
    "hgrn2": "hgrn2",
    "local-attention": "local-attention",
    "moa": "moa",
    "rglru": "rglru",
}


@pytest.mark.parametrize("mode", ["l2-norm-gelu", "softmax"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_builds_trains_and_decodes(mixer: str, mode: str) -> None:
    model = decoder({"kind": "pattention", "norm_mode": mode}, "swiglu", MIXERS[mixer])
    assert any(isinstance(module, Pattention) for module in model.blocks[0].mixer.modules())  # type: ignore[union-attr]
    train_one_step(model)
    decodes_as_it_reads(model)


@pytest.mark.parametrize("feedforward", ["mlp", "swiglu", "geglu", "pattention", "smoe"])
def test_every_feedforward_builds_trains_and_decodes(feedforward: str) -> None:
    model = decoder("pattention", feedforward)
    train_one_step(model)
    decodes_as_it_reads(model)


@torch.no_grad()
def decodes_as_it_reads(model: Decoder) -> None:
    model.eval()
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(2))
    whole = model(tokens).hidden_btd
    state = model.new_state(2, 12)
    steps = [model(tokens[:, :5], state=state).hidden_btd]
    steps += [model(tokens[:, t : t + 1], state=state).hidden_btd for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=2e-5)


def test_context_makes_it_for_any_use() -> None:
    part = parse_part("projection", {"kind": "pattention", "output_tokens": 3})
    context = BuildContext(16, 8, 2, 0, vocab_size=5, length=4, projection=part)
    made = context.linear(16, 24, "output", bias=True)
    assert (made.in_features, made.out_features, made.tokens, made.use) == (16, 24, 3, "output")
    assert made.bias is not None and context.linear(16, 24, "input").bias is None
