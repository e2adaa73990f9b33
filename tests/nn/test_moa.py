"""Mixture of attention heads: the plain reference, decoding, padding, documents, head order, head counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.multihead import AttentionConfig
from torchstone.nn.attention.observe import observe
from torchstone.nn.context import BuildContext
from torchstone.nn.experts.moa import MixtureOfAttentionHeads, MoAConfig
from torchstone.nn.experts.reference import moa
from torchstone.nn.position.base import PositionContext
from torchstone.nn.position.rotary import RotaryConfig
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

WIDTH, HEAD_DIM, VOCABULARY, LENGTH = 32, 8, 31, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "2 of 4, 2 heads": {"num_experts": 4, "kv_heads": 2},
    "3 of 5, 1 head, half": {
        "num_experts": 5,
        "top_k": 3,
        "kv_heads": 1,
        "position": {"kind": "rotary", "layout": "half"},
    },
    "1 of 4, window": {"num_experts": 4, "top_k": 1, "router": "softmax-topk", "window": 4},
    "no position": {"num_experts": 3, "position": "none"},
    "alibi, loop": {"num_experts": 4, "position": "alibi", "dispatch": "loop"},
}

every_setting = pytest.mark.parametrize("name", SETTINGS)
both_dispatches = pytest.mark.parametrize("dispatch", ["grouped", "loop"])


def context(width: int = WIDTH) -> BuildContext:
    return BuildContext(width, HEAD_DIM, 1, 0, VOCABULARY, LENGTH)


def filled(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.double()


def mixer(**settings: Any) -> MixtureOfAttentionHeads:
    part: Any = parse_part("mixer", {"kind": "moa", "num_experts": 4, **settings})
    return filled(part.build(context()))


def decoder(name: str) -> Decoder:
    block = {
        "mixer": {"kind": "moa", **SETTINGS[name]},
        "feedforward": {"kind": "smoe", "num_experts": 4, "hidden": 16},
    }
    config = {"width": WIDTH, "depth": 2, "head_dim": HEAD_DIM, "block": block}
    start = {"kind": "normal", "std": 0.3, "scale_residual": False}
    return (
        DecoderConfig.model_validate({**config, "initialisation": start}).build(VOCABULARY, LENGTH, 0).double().eval()
    )


def inputs(batch: int = 1, length: int = 7) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def close(left: Any, right: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


# One layer ----------------------------------------------------------------------------------------


@both_dispatches
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)], ids=str)
def test_equals_the_plain_reference(dispatch: str, heads: tuple[int, int]) -> None:
    kv_heads, top_k = heads
    position = {"kind": "rotary", "layout": "half"}
    made, x_btd = mixer(kv_heads=kv_heads, top_k=top_k, dispatch=dispatch, position=position), inputs()
    rotary = RotaryConfig(layout="half").build(PositionContext(HEAD_DIM, 1, LENGTH))

    def turn(x_td: Tensor) -> Tensor:
        turned, _ = rotary.rotate(x_td[None, :, None], x_td[None, :, None], Span(), 0)
        return turned[0, :, 0]

    with observe(made) as record:
        ours, _ = made(x_btd, Span())
    weights = dict(made.named_parameters())
    theirs, maps_hts = moa(x_btd[0], weights, kv_heads, top_k, turn)
    close(ours[0], theirs, 1e-6)  # tables of rotation are fp32
    seen = next(iter(record.values()))
    assert seen.maps is not None and seen.heads is not None
    close(seen.maps[0].unflatten(0, (kv_heads, top_k)).transpose(0, 1).flatten(0, 1), maps_hts, 1e-6)
    assert seen.heads.shape == (1, 7, kv_heads * top_k, HEAD_DIM)
    values = list(weights.values())
    close(torch.autograd.grad(ours.square().sum(), values), torch.autograd.grad(theirs.square().sum(), values), 1e-5)


@every_setting
def test_loop_equals_grouped(name: str) -> None:
    found = []
    for dispatch in ("grouped", "loop"):
        made, x_btd = mixer(**{**SETTINGS[name], "dispatch": dispatch}), inputs(2).requires_grad_()
        y_btd, _ = made(x_btd, Span())
        found.append((y_btd, torch.autograd.grad(y_btd.square().sum(), [x_btd, *made.parameters()])))
    close(found[0], found[1])


@torch.no_grad()
def test_equal_experts_are_plain_attention() -> None:
    """Gates sum to 1, so that k equal experts are one attention layer with the heads of one expert."""
    made, x_btd = mixer(kv_heads=4, bias=False), inputs(2)
    plain = filled(AttentionConfig(heads=4, kv_heads=4).build(context()))
    made.query_experts.copy_(plain.w_q.weight.expand_as(made.query_experts))
    made.output_experts.copy_(plain.w_o.weight.expand_as(made.output_experts))
    made.w_k.weight.copy_(plain.w_k.weight)
    made.w_v.weight.copy_(plain.w_v.weight)
    close(made(x_btd, Span())[0], plain(x_btd, Span())[0])


def test_experts_without_tokens_get_gradients_of_zero() -> None:
    made, x_btd = mixer(), inputs(2)
    with torch.no_grad():
        made.router.weight.zero_()  # ties: experts 0 and 1, always
    y_btd, _ = made(x_btd, Span())
    y_btd.square().sum().backward()
    for weight in (made.query_experts, made.output_experts):
        assert weight.grad is not None and weight.grad[:2].any() and not weight.grad[2:].any()


def test_gradcheck() -> None:
    made, x_btd = mixer(num_experts=3, kv_heads=1, position="none"), inputs(1, 3).requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def run(x_btd: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x_btd, Span()))[0]

    assert torch.autograd.gradcheck(run, (x_btd, *made.parameters()))


def test_routes_in_fp32_under_autocast() -> None:
    made, x_btd = mixer().float(), inputs(2).float()
    chosen = []
    made.router.register_forward_hook(lambda module, given, routing: chosen.append(routing.experts_nk))
    plain, _ = made(x_btd, Span())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = made(x_btd, Span())
    assert cast.dtype == torch.bfloat16 and torch.equal(*chosen)
    close(cast.float(), plain, 0.1)


# In a model ---------------------------------------------------------------------------------------


@every_setting
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [6, 1, 1, 2]], ids=str)
@torch.no_grad()
def test_parallel_equals_steps(name: str, pieces: list[int]) -> None:
    model, tokens_bt = decoder(name), tokens()
    state = model.new_state(2, LENGTH)
    parts = [model(piece, state=state).hidden_btd for piece in tokens_bt.split(pieces, dim=1)]
    close(torch.cat(parts, dim=1), model(tokens_bt).hidden_btd, 1e-6)


@every_setting
@torch.no_grad()
def test_causality(name: str) -> None:
    model, tokens_bt = decoder(name), tokens(1)
    before = model(tokens_bt).hidden_btd
    changed = tokens_bt.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    after = model(changed).hidden_btd
    close(after[:, :5], before[:, :5])
    assert (after[:, 5] - before[:, 5]).abs().max() > 1e-3


@every_setting
@torch.no_grad()
def test_left_padding_changes_nothing_and_gives_zeros(name: str) -> None:
    model, tokens_bt = decoder(name), tokens()
    valid_bt = torch.arange(LENGTH) >= torch.tensor([[3], [0]])
    span = Span(positions_bt=(torch.arange(LENGTH) - torch.tensor([[3], [0]])).clamp_min(0), valid_bt=valid_bt)
    padded, alone = model(tokens_bt, span), model(tokens_bt[:1, 3:])
    close(padded.hidden_btd[:1, 3:], alone.hidden_btd, 1e-6)
    first: Any = model.blocks[0]
    y_btd, _ = first.mixer(inputs(2, LENGTH), span)
    assert torch.equal(y_btd[0, :3], torch.zeros(3, WIDTH, dtype=torch.float64))


@every_setting
@torch.no_grad()
def test_documents_are_separate(name: str) -> None:
    model, tokens_bt = decoder(name), tokens(1)
    documents_bt, positions_bt = torch.tensor([[3] * 4 + [8] * 6]), torch.tensor([[*range(4), *range(6)]])
    packed = model(tokens_bt, Span(positions_bt=positions_bt, documents_bt=documents_bt)).hidden_btd
    close(packed[:, 4:], model(tokens_bt[:, 4:]).hidden_btd, 1e-6)


@both_dispatches
@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_batch_has_losses_of_zero(dispatch: str, masked: bool) -> None:
    moe = {"num_experts": 4, "dispatch": dispatch}
    block = {"mixer": {"kind": "moa", **moe}, "feedforward": {"kind": "smoe", "hidden": 16, **moe}}
    model = DecoderConfig.model_validate({"width": WIDTH, "depth": 2, "head_dim": HEAD_DIM, "block": block}).build(
        9, 8, 0
    )
    span = Span(valid_bt=torch.ones(0, 6, dtype=torch.bool)) if masked else Span()
    output = model(torch.zeros(0, 6, dtype=torch.long), span)
    assert output.hidden_btd.shape == (0, 6, WIDTH) and output.auxiliary is not None and output.auxiliary == 0
    (output.hidden_btd.sum() + output.auxiliary).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "blocks.0.mixer.router.weight" in grads and not any(grad.any() for grad in grads.values())
    state = model.eval().new_state(0, 8)
    for step in (6, 1):
        assert model(torch.zeros(0, step, dtype=torch.long), state=state).hidden_btd.shape == (0, step, WIDTH)
    assert all(torch.tensor(list(model.diagnostics().values())).isfinite())


# Counts and settings ------------------------------------------------------------------------------


def test_the_cache_is_that_of_the_shared_heads() -> None:
    made, plain = mixer(kv_heads=2), AttentionConfig(heads=4, kv_heads=2).build(context())
    sizes = [one.new_state(1, 64, "cpu", torch.float32).nbytes() for one in (made, plain)]
    assert sizes[0] == sizes[1] == 2 * 2 * HEAD_DIM * 64 * 4


def test_flops_are_those_that_a_counter_sees() -> None:
    made = mixer(kv_heads=2).float()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), observe(made):
        made(inputs(2).float(), Span())
    assert counter.get_total_flops() == made.flops(7) * 14


def test_head_counts_follow_from_what_is_given() -> None:
    def heads(**settings: Any) -> tuple[int, int]:
        made = mixer(**settings)
        return made.heads, made.key_shape[0]

    assert heads() == (4, 2)  # width 32 / head_dim 8, two experts
    assert heads(heads=8) == (8, 4)
    assert heads(kv_heads=3, top_k=3) == (9, 3)
    assert heads(head_dim=4) == (8, 4)


def test_channels_of_a_head_follow_the_rule_of_every_attention() -> None:
    def channels(**settings: Any) -> int:
        return mixer(**settings).key_shape[1]

    assert channels() == HEAD_DIM
    assert channels(heads=8) == AttentionConfig(heads=8).build(context()).head_dim == 4
    assert channels(heads=8, kv_heads=4) == 4
    assert channels(heads=8, head_dim=16) == 16
    assert channels(kv_heads=4) == HEAD_DIM  # more heads of the model's size


LOST: list[tuple[str, Any, str]] = [
    ("qk_norm", True, "qk_norm: true"),
    ("qkv_bias", True, "qkv_bias: true"),
    ("dropout", 0.1, r"dropout: 0\.1"),
    ("output_norm", True, "output_norm: true"),
    ("score_processor", {"kind": "dape"}, "score_processor: dape"),
]


@pytest.mark.parametrize(("name", "value", "words"), LOST)
def test_replacing_attention_drops_nothing_silently(name: str, value: Any, words: str) -> None:
    previous = {**AttentionConfig(window=5).model_dump(mode="json"), name: value}
    with pytest.raises(ConfigError, match=f"replaced attention has {words} and moa has no such setting"):
        MoAConfig.inherit(previous)


def test_replacing_attention_keeps_sizes_window_and_position() -> None:
    previous = AttentionConfig(heads=4, window=5, output_bias=True, position="alibi").model_dump(mode="json")
    part: Any = parse_part("mixer", {"kind": "moa", **MoAConfig.inherit(previous)})
    assert (part.heads, part.window, part.position.kind, part.bias) == (4, 5, "alibi", True)
    other = {**previous, "window_convention": "plus-one"}
    with pytest.raises(ConfigError, match="window_convention: plus-one and moa has no such setting"):
        MoAConfig.inherit(other)
    MoAConfig.inherit({**other, "window": None})
    assert MoAConfig.inherit(MoAConfig(bias=False, top_k=3).model_dump(mode="json")).items() >= {
        "bias": False, "top_k": 3,
    }.items()  # fmt: skip


def test_head_counts_that_do_not_fit_are_refused() -> None:
    for settings, words in (
        ({"heads": 6, "kv_heads": 2}, "heads is 6, and top_k 2 × kv_heads 2 = 4"),
        ({"top_k": 3}, "4 query heads are no multiple of top_k 3"),
        ({"head_dim": 12}, "width 32 is no multiple of 1 × head_dim 12"),
    ):
        with pytest.raises(ConfigError, match=words):
            mixer(**settings)
    with pytest.raises(ValidationError, match="top_k is 5 and there are 4 experts"):
        MoAConfig.model_validate({"num_experts": 4, "top_k": 5})
