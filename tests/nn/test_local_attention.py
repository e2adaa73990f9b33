"""Local attention: both window conventions against masked patterns, documents, states, the rotated half, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.nn.attention.local import LocalAttentionConfig
from torchstone.nn.attention.multihead import AttentionConfig, MultiHeadAttention
from torchstone.nn.context import BuildContext
from torchstone.nn.initialisation import NormalConfig
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

WIDTH, LENGTH, WINDOW, CLOSE = 16, 14, 4, 1e-5
KEYS = {"inclusive": WINDOW, "plus-one": WINDOW + 1}

both_conventions = pytest.mark.parametrize("convention", KEYS)


def filled(config: Any) -> MultiHeadAttention:
    mixer = config.build(BuildContext(WIDTH, 8, 2, 0, 7, LENGTH))
    NormalConfig(std=0.5, scale_residual=False).fill(mixer, 2, 0)
    if mixer.w_o.bias is not None:
        mixer.w_o.bias.data = torch.linspace(-1, 1, WIDTH)
    return mixer.eval()


def local(**settings: Any) -> MultiHeadAttention:
    return filled(LocalAttentionConfig.model_validate({"window": WINDOW, **settings}))


def inputs(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=CLOSE, rtol=CLOSE)


@both_conventions
@torch.no_grad()
def test_a_window_is_a_pattern_of_so_many_keys(convention: Any) -> None:
    mixer, x_btd = local(window_convention=convention), inputs()
    position = LocalAttentionConfig().position
    whole = filled(AttentionConfig(kv_heads=1, output_bias=True, position=position))
    whole.load_state_dict(mixer.state_dict())
    back_ts = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen_ts = (back_ts >= 0) & (back_ts < KEYS[convention])
    close(mixer(x_btd, Span())[0], whole(x_btd, Span(allowed_bts=seen_ts))[0])


@both_conventions
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [6, 1, 1, 6], [2, 9, 3]], ids=str)
@torch.no_grad()
def test_the_state_is_a_ring_of_the_window(convention: Any, pieces: list[int]) -> None:
    mixer, x_btd = local(window_convention=convention), inputs()
    state = mixer.new_state(2, LENGTH, "cpu", torch.float32)
    parts = [mixer(piece, Span(), state)[0] for piece in x_btd.split(pieces, dim=1)]
    close(torch.cat(parts, dim=1), mixer(x_btd, Span())[0])
    assert state.k_bgsd.shape == (2, 1, KEYS[convention], 8)


@both_conventions
@torch.no_grad()
def test_packed_documents_equal_documents_alone(convention: Any) -> None:
    mixer, x_btd, cut = local(window_convention=convention), inputs(batch=1), 5
    documents_bt = (torch.arange(LENGTH) >= cut).long()[None]
    packed, _ = mixer(x_btd, Span(documents_bt=documents_bt))
    close(packed, torch.cat([mixer(part, Span())[0] for part in (x_btd[:, :cut], x_btd[:, cut:])], dim=1))


@torch.no_grad()
def test_only_the_first_half_of_a_head_turns() -> None:
    mixer, x_btd = local(window=LENGTH), inputs(batch=1)
    shifted = Span(positions_bt=torch.arange(LENGTH)[None] * 3)
    assert float((mixer(x_btd, shifted)[0] - mixer(x_btd, Span())[0]).abs().max()) > 1e-3
    for head in (mixer.w_q, mixer.w_k):
        head.weight.data.unflatten(0, (-1, 8))[:, :4] = 0  # rows that turn
    close(mixer(x_btd, shifted)[0], mixer(x_btd, Span())[0])


def test_it_has_one_key_head_and_one_bias() -> None:
    mixer = local()
    shapes = {name: tuple(value.shape) for name, value in mixer.named_parameters()}
    assert shapes == {
        "w_q.weight": (16, 16), "w_k.weight": (8, 16), "w_v.weight": (8, 16), "w_o.weight": (16, 16), "w_o.bias": (16,),
    }  # fmt: skip
    assert "w_o.bias" not in dict(local(output_bias=False).named_parameters())
    assert local(heads=4, kv_heads=2).w_k.weight.shape == (8, 16)


def test_the_bias_does_not_reach_padding() -> None:
    valid_bt = torch.arange(LENGTH).expand(2, -1) >= 3
    out_btd, _ = local()(inputs(), Span(valid_bt=valid_bt))
    assert bool((out_btd[:, :3] == 0).all()) and bool((out_btd[:, 3:] != 0).any())


def test_half_a_head_without_pairs_is_refused() -> None:
    with pytest.raises(ConfigError, match="turns 3 of 6 channels"):
        local(heads=2, head_dim=6)
    local(heads=2, head_dim=6, position="none")


def test_a_window_of_nothing_and_an_unknown_convention_are_refused() -> None:
    for wrong in ({"window": 0}, {"window": -3}, {"window_convention": "plus_one"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            parse_part("mixer", {"kind": "local-attention", **wrong})


def test_what_replaces_attention_keeps_its_heads_and_window_and_nothing_else() -> None:
    previous = {"kind": "attention", "heads": 4, "kv_heads": None, "window": 8, "window_convention": "plus-one",
                "output_bias": False, "position": {"kind": "alibi"}}  # fmt: skip
    kept = LocalAttentionConfig.inherit(previous)
    assert kept == {"heads": 4, "window": 8, "window_convention": "plus-one"}
    assert LocalAttentionConfig.inherit({**previous, "window": None}) == {"heads": 4}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("qk_norm", True, "qk_norm: true"),
        ("qkv_bias", True, "qkv_bias: true"),
        ("dropout", 0.1, r"dropout: 0\.1"),
        ("output_norm", True, "output_norm: true"),
        ("score_processor", {"kind": "dape"}, "score_processor: dape"),
    ],
)
def test_replacing_attention_drops_nothing_silently(name: str, value: Any, words: str) -> None:
    previous = {**AttentionConfig().model_dump(mode="json"), name: value}
    with pytest.raises(ConfigError, match=f"replaced attention has {words} and local-attention has no such setting"):
        LocalAttentionConfig.inherit(previous)


def test_another_setting_of_the_same_kind_keeps_the_others() -> None:
    previous = LocalAttentionConfig(kv_heads=2, window=8, output_bias=False, position="alibi").model_dump(mode="json")
    kept: Any = parse_part("mixer", {"kind": "local-attention", **LocalAttentionConfig.inherit(previous)})
    assert (kept.kv_heads, kept.window, kept.output_bias, kept.position.kind) == (2, 8, False, "alibi")
