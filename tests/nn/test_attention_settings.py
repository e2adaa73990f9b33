"""Attention settings: heads from what is given, honest refusals, inheritance, masks built once, dropout, observation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from torchstone.errors import ConfigError
from torchstone.models.decoder import DecoderConfig
from torchstone.nn.attention import mask as mask_module
from torchstone.nn.attention.adaptive_temperature import adaptive_softmax, attention_entropy
from torchstone.nn.attention.differential import DifferentialConfig
from torchstone.nn.attention.observe import observe
from torchstone.nn.context import BuildContext
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

CONTEXT = BuildContext(width=32, head_dim=8, depth=2, layer=1, vocab_size=10, length=16)


def build(**settings: Any) -> Any:
    return parse_part("mixer", settings).build(CONTEXT)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "maps", "heads", "head_dim"),
    [
        ({"kind": "attention"}, 4, 4, 8),
        ({"kind": "attention", "heads": 2}, 2, 2, 16),
        ({"kind": "attention", "heads": 6, "head_dim": 8}, 6, 6, 8),
        ({"kind": "differential"}, 4, 2, 8),
        ({"kind": "differential", "heads": 1}, 2, 1, 16),
        ({"kind": "differential", "version": "v2"}, 8, 4, 8),
        ({"kind": "differential", "replaces_heads": 4}, 4, 2, 8),
        ({"kind": "differential", "version": "v2", "replaces_heads": 4}, 8, 4, 8),
    ],
)
def test_heads_follow_from_what_is_given(settings: dict[str, Any], maps: int, heads: int, head_dim: int) -> None:
    mixer = build(**settings)
    assert (mixer.maps, mixer.heads, mixer.head_dim) == (maps, heads, head_dim)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "attention", "heads": 5}, "no multiple of"),
        ({"kind": "attention", "head_dim": 5, "position": "none"}, "no multiple of"),
        ({"kind": "attention", "heads": 4, "kv_heads": 3}, "no multiple of 3 kv_heads"),
        ({"kind": "attention", "heads": 32}, "head_dim is 1, which is odd"),
        ({"kind": "differential", "heads": 4, "head_dim": 5}, "head_dim is 5, which is odd"),
        ({"kind": "differential", "dropout": 0.1}, "only dropout 0 is allowed"),
        ({"kind": "differential", "replaces_heads": 3}, "replaces_heads is 3, which is odd"),
        ({"kind": "differential", "replaces_heads": 4, "replaces_kv_heads": 1}, "replaces_kv_heads is 1, which is odd"),
        ({"kind": "differential", "heads": 2, "kv_heads": 3, "head_dim": 8}, "no multiple of 3 kv_heads"),
        (
            {"kind": "differential", "version": "v2", "heads": 3, "kv_heads": 2, "head_dim": 8},
            "pairs would straddle KV groups",
        ),
        ({"kind": "differential", "version": "v2", "head_norm": False}, "v2 has no head_norm"),
        ({"kind": "differential", "version": "v2", "lambda_init": 0.5}, "v2 has no lambda_init"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_replacing_attention_keeps_the_size() -> None:
    previous = parse_part("mixer", {"kind": "attention", "heads": 4, "kv_heads": 2, "window": 5}).model_dump()
    for version, heads in (("v1", 2), ("v2", 4)):
        carried = DifferentialConfig.inherit(previous)
        mixer = build(kind="differential", version=version, **carried)
        assert mixer.heads == heads
        assert mixer.window == 5
    plain, v1 = build(kind="attention", heads=4), build(kind="differential", replaces_heads=4)
    extra = sum(p.numel() for p in v1.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 4 * 8 + 2 * 8  # the vectors of λ and the gain


@pytest.mark.parametrize("setting", ["qk_norm", "output_norm", "qkv_bias", "output_bias"])
def test_replacing_attention_drops_nothing_silently(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"replaced attention has {setting}: true and differential has no such"):
        DifferentialConfig.inherit({"kind": "attention", setting: True})


def test_how_a_window_is_counted_is_lost_only_where_there_is_a_window() -> None:
    previous = {"kind": "attention", "window": 4, "window_convention": "plus-one"}
    with pytest.raises(ConfigError, match="set window_convention: inclusive in the recipe"):
        DifferentialConfig.inherit(previous)
    assert DifferentialConfig.inherit({**previous, "window": None}) == {"window": None}


def test_heads_of_the_same_kind_stay_what_they_are() -> None:
    previous = parse_part("mixer", {"kind": "differential", "heads": 2, "kv_heads": 1, "version": "v1"}).model_dump()
    mixer = build(kind="differential", **DifferentialConfig.inherit(previous))
    assert (mixer.heads, mixer.key_shape) == (2, (2, 8))


MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"kind": "attention"},
    "local": {"kind": "local-attention", "window": 3},
    "v1": {"kind": "differential"},
    "v2": {"kind": "differential", "version": "v2"},
    "moa": {"kind": "moa", "bias": False},
}


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_padding_gives_zeros_whatever_the_projection_makes_of_zeros(name: str) -> None:
    projection = parse_part("projection", {"kind": "pattention", "norm_mode": "softmax"})
    part: Any = parse_part("mixer", MIXERS[name])
    mixer = part.build(dataclasses.replace(CONTEXT, projection=projection))
    for parameter in mixer.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    for module in mixer.modules():
        getattr(module, "fill_buffers", tuple)()
    x_btd = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    valid_bt = torch.arange(6) >= torch.tensor([[2], [0]])
    y_btd, _ = mixer(x_btd, Span(valid_bt=valid_bt))
    assert torch.equal(y_btd[0, :2], torch.zeros(2, 32)) and bool((y_btd[valid_bt] != 0).any(-1).all())
    state = mixer.new_state(2, 6, "cpu", torch.float32)
    steps = [
        mixer(x_btd[:, part], Span(valid_bt=valid_bt[:, part]), state)[0]
        for part in (slice(0, 1), slice(1, 2), slice(2, 6))
    ]
    torch.testing.assert_close(torch.cat(steps, 1)[0, :2], torch.zeros(2, 32), rtol=0, atol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("position", ["rotary", "kerple"])
def test_an_empty_batch_passes_through(version: str, position: str) -> None:
    mixer = build(kind="differential", version=version, position=position)
    y_btd, _ = mixer(torch.zeros(0, 6, 32, requires_grad=True), Span())
    y_btd.sum().backward()
    assert y_btd.shape == (0, 6, 32) and not mixer.w_q.weight.grad.any()
    state = mixer.eval().new_state(0, 7, "cpu", torch.float32)
    with torch.no_grad():
        for length in (6, 1):
            assert mixer(torch.zeros(0, length, 32), Span(), state)[0].shape == (0, length, 32)


def test_lambda_stays_fp32_in_half_precision() -> None:
    mixer = build(kind="differential")
    with torch.no_grad():
        mixer.lambda_q1.fill_(0.1234567)
    mixer.to(torch.bfloat16)
    assert mixer.w_q.weight.dtype == torch.bfloat16
    assert mixer.lambda_q1.dtype == torch.float32
    assert mixer.lambda_q1[0].item() == pytest.approx(0.1234567, abs=1e-8)  # bf16 would be off by 1e-4


def test_gradients_of_lambda_stay_fp32_with_their_vectors() -> None:
    mixer = build(kind="differential")
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    for name in names:
        torch.nn.init.normal_(getattr(mixer, name), generator=torch.Generator().manual_seed(len(name)))
    mixer.lambda_value().square().backward()
    wanted = {name: (getattr(mixer, name).detach() - getattr(mixer, name).grad).clone() for name in names}
    mixer.bfloat16()
    torch.optim.SGD([getattr(mixer, name) for name in names], lr=1.0).step()
    for name in names:
        torch.testing.assert_close(getattr(mixer, name).detach(), wanted[name], rtol=1e-6, atol=1e-6)


def test_sign_flips_where_lambda_exceeds_one() -> None:
    mixer = build(kind="differential")
    with torch.no_grad():
        for name in ("w_q", "w_k", "w_v", "w_o"):
            getattr(mixer, name).weight.normal_(generator=torch.Generator().manual_seed(0))
        x_btd = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
        mixer.lambda_q1.zero_()
        mixer.lambda_q2.zero_()
        outputs = []
        for value in (0.5, 1.5):  # one token: only the sign of 1 − λ is left after the norm
            mixer.lambda_value = lambda value=value: torch.tensor(value)
            outputs.append(mixer(x_btd, Span())[0])
    torch.testing.assert_close(outputs[0], -outputs[1], atol=1e-3, rtol=1e-3)


def test_masks_are_built_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = mask_module._combine
    monkeypatch.setattr(mask_module, "_combine", lambda *given: built.append(1) or original(*given))
    config = DecoderConfig.model_validate(
        {"width": 16, "depth": 4, "head_dim": 8, "pattern": [{"kind": "attention"}, {"kind": "attention", "window": 2}]}
    )
    model = config.build(11, 8, 0)
    tokens_bt = torch.zeros(1, 8, dtype=torch.long)
    model(tokens_bt)
    assert len(built) == 1  # the window; plain causal layers need none
    model(tokens_bt, Span(documents_bt=torch.zeros_like(tokens_bt)))
    assert len(built) == 3  # one for each kind of layer


def test_dropout_acts_in_training_only() -> None:
    mixer = build(kind="attention", dropout=0.5)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    x_btd = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    exact = build(kind="attention")
    exact.load_state_dict(mixer.state_dict())
    expected = exact(x_btd, Span())[0]
    torch.testing.assert_close(mixer.eval()(x_btd, Span())[0], expected)
    assert (mixer.train()(x_btd, Span())[0] - expected).abs().max() > 1e-3


def test_observation_shows_signed_weights() -> None:
    mixer = build(kind="differential", lambda_init=0.8)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "lambda" not in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    x_btd = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    with observe(mixer) as record:
        mixer(x_btd, Span())
    seen = record[""]
    assert seen.maps.shape == (1, 4, 8, 8) and seen.weights.shape == (1, 2, 8, 8) and seen.heads.shape == (1, 8, 2, 16)
    assert seen.weights.min() < 0
    lam = mixer.diagnostics()["lambda"]
    torch.testing.assert_close(seen.weights.sum(-1), torch.full((1, 2, 8), 1 - lam), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="no mixer that can be observed"), observe(torch.nn.Linear(2, 2)):
        pass


def test_entropy_and_temperature() -> None:
    uniform = torch.full((2, 8), 1 / 8)
    torch.testing.assert_close(attention_entropy(uniform), torch.full((2,), 8.0).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(attention_entropy(-uniform), attention_entropy(uniform))  # signed maps count |a|
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf], [-torch.inf] * 4])
    sharpened = adaptive_softmax(scores)
    assert sharpened[0, 2] >= scores[0].softmax(-1)[2]
    assert sharpened[0, 3] == 0
    assert torch.equal(sharpened[1], torch.zeros(4))


def test_explicit_pattern_is_checked() -> None:
    mixer = build(kind="attention")
    x_btd = torch.zeros(1, 4, 32)
    with pytest.raises(ConfigError, match="must be bool of shape"):
        mixer(x_btd, Span(allowed_bts=torch.ones(4, 5, dtype=torch.bool)))
    with pytest.raises(ConfigError, match="decoding state"):
        mixer(x_btd, Span(allowed_bts=torch.ones(4, 4, dtype=torch.bool)), mixer.new_state(1, 4, "cpu", torch.float32))
