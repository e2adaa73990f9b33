"""Rotary position, norm, feed-forward, head and initialisation, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from torchstone.errors import ConfigError
from torchstone.models.decoder import DecoderConfig
from torchstone.nn.context import BuildContext
from torchstone.nn.initialisation import generator_for
from torchstone.nn.norm.rmsnorm import RMSNorm
from torchstone.nn.position.rotary import Rotary, turn
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

CONTEXT = BuildContext(width=24, head_dim=8, depth=3, layer=0, vocab_size=10, length=16)


def test_rotation_turns_pairs_by_position() -> None:
    x_bthd = torch.randn(1, 5, 1, 4, generator=torch.Generator().manual_seed(0))
    for layout, pairs in (("interleaved", [(0, 1), (2, 3)]), ("half", [(0, 2), (1, 3)])):
        rotary = Rotary(4, 100.0, layout)  # type: ignore[arg-type]
        tables = rotary.tables(Span(), 5, 0, x_bthd.device)
        turned = turn(x_bthd, *tables, layout)  # type: ignore[arg-type]
        for t in range(5):
            for pair, (i, j) in enumerate(pairs):
                phi = t * 100.0 ** (-2 * pair / 4)
                x, y = x_bthd[0, t, 0, i].item(), x_bthd[0, t, 0, j].item()
                assert turned[0, t, 0, i].item() == pytest.approx(x * math.cos(phi) - y * math.sin(phi), abs=1e-5)
                assert turned[0, t, 0, j].item() == pytest.approx(y * math.cos(phi) + x * math.sin(phi), abs=1e-5)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_on_distance_and_survive_arranging(layout: str) -> None:
    rotary = Rotary(8, 10000.0, layout)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x_btd = torch.randn(1, 6, 24, generator=generator)
    w_q, w_k = torch.randn(8, 24, generator=generator), torch.randn(8, 24, generator=generator)
    arranged = [(x_btd @ rotary.arrange(w).T)[:, :, None] for w in (w_q, w_k)]
    plain = [(x_btd @ w.T)[:, :, None] for w in (w_q, w_k)]
    for offset in (0, 100_000):
        tables = rotary.tables(Span(), 6, offset, x_btd.device)
        q, k = rotary.rotate(*arranged, Span(), offset)
        expected_q, expected_k = (turn(y, *tables, layout) for y in plain)  # type: ignore[arg-type]
        scores = torch.einsum("bthd,bshd->ts", q, k)
        torch.testing.assert_close(scores, torch.einsum("bthd,bshd->ts", expected_q, expected_k), atol=1e-3, rtol=1e-4)
    near = torch.einsum("bthd,bshd->ts", *rotary.rotate(*arranged, Span(), 0))
    torch.testing.assert_close(scores, near, atol=1e-2, rtol=1e-3)  # the same distances, far away


def test_odd_head_dim_has_no_rotation() -> None:
    with pytest.raises(ConfigError, match="odd"):
        Rotary(7, 10000.0, "half")


def test_rmsnorm() -> None:
    norm = RMSNorm(6, eps=1e-3)
    with torch.no_grad():
        norm.gain.copy_(torch.arange(6.0))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.arange(6.0) * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected)
    large = (1e3 + torch.randn(1, 6)).bfloat16()
    torch.testing.assert_close(norm(large), norm(large.float()).bfloat16())


def test_swiglu() -> None:
    part = parse_part("feedforward", "swiglu")
    layer = part.build(CONTEXT)  # type: ignore[attr-defined]
    assert layer.w_up.out_features == 64  # 8/3 · 24, a multiple of 8
    x = torch.randn(2, 3, 24)
    expected = layer.w_down(F.silu(layer.w_gate(x)) * layer.w_up(x))
    torch.testing.assert_close(layer(x, Span()), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_head(tied: bool) -> None:
    config = DecoderConfig.model_validate(
        {"width": 16, "depth": 1, "head_dim": 8, "head": {"kind": "linear", "tied": tied}}
    )
    model = config.build(11, 8, 0)
    assert (model.head.weight_vd is model.embed.weight) == tied
    assert len([name for name in model.state_dict() if "embed" in name or "head" in name]) == (1 if tied else 2)
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.head.weight_vd.T)
    model.to(torch.float64)
    assert model.head.weight_vd.dtype == torch.float64


def _model(depth: int = 2, seed: int = 0, **block: object) -> torch.nn.Module:
    config = {"width": 64, "depth": depth, "head_dim": 8, "block": block}
    return DecoderConfig.model_validate(config).build(101, 8, seed)


def test_equal_names_and_shapes_start_equal() -> None:
    plain, differential, deeper = _model(), _model(mixer="differential"), _model(depth=3)
    own, other = dict(plain.named_parameters()), dict(differential.named_parameters())
    shared = [name for name in own if name in other]
    assert "blocks.0.mixer.w_q.weight" in shared and len(shared) == len(own)
    assert all(torch.equal(own[name], other[name]) for name in shared)
    same = dict(deeper.named_parameters())["blocks.1.mixer.w_k.weight"]
    assert torch.equal(own["blocks.1.mixer.w_k.weight"], same)
    reseeded = dict(_model(seed=1).named_parameters())
    assert not torch.equal(own["embed.weight"], reseeded["embed.weight"])


def test_initial_spread() -> None:
    model = _model(depth=8, mixer="differential")
    values = dict(model.named_parameters())
    assert values["blocks.0.mixer.w_q.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert values["blocks.0.feedforward.w_down.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert values["embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(values["norm.gain"], torch.ones(64))
    vectors = torch.cat([value for name, value in values.items() if "lambda_" in name])
    assert vectors.std().item() == pytest.approx(0.1, rel=0.2)
    assert not torch.equal(values["blocks.0.mixer.lambda_q1"], values["blocks.0.mixer.lambda_k1"])


def test_generators_differ_by_name_and_seed() -> None:
    draws = {torch.rand(1, generator=generator_for(seed, name)).item() for seed in (0, 1) for name in ("a", "b")}
    assert len(draws) == 4
