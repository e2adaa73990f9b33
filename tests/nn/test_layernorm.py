"""LayerNorm: its formula, what it learns, half precision, constant rows."""

from __future__ import annotations

import pytest
import torch

from torchstone.models.decoder import DecoderConfig
from torchstone.nn.norm.layernorm import LayerNorm
from torchstone.optim.groups import decay_groups


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_formula_and_parameters(scale: bool, bias: bool) -> None:
    norm = LayerNorm(6, 1e-5, scale, bias).double()
    assert set(dict(norm.named_parameters())) == ({"gain"} if scale else set()) | ({"bias"} if bias else set())
    draw = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=draw)
    x = torch.randn(4, 6, generator=draw, dtype=torch.float64).requires_grad_()
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    wanted = wanted * norm.gain if norm.gain is not None else wanted
    wanted = wanted + norm.bias if norm.bias is not None else wanted
    torch.testing.assert_close(norm(x), wanted)
    assert torch.autograd.gradcheck(norm, (x,))


def test_statistics_are_fine_in_half_precision() -> None:
    draw = torch.Generator().manual_seed(0)
    x = (300 + torch.randn(8, 512, generator=draw)).bfloat16()  # in bf16 the sum of 512 such numbers keeps two digits
    norm = LayerNorm(512, 1e-5, True, True).requires_grad_(False)
    y = norm.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    exact = LayerNorm(512, 1e-5, False, False)(x.float())
    assert float((y.float() - exact).abs().max()) < 0.02


def test_a_constant_row_gives_zeros() -> None:
    norm = LayerNorm(8, 1e-5, False, False)
    x = torch.full((2, 8), 3.0, requires_grad=True)
    y = norm(x)
    assert bool((y == 0).all())
    y.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_in_a_decoder_it_starts_as_identity_and_is_not_decayed() -> None:
    block = {"norm": {"kind": "layernorm"}}
    model = DecoderConfig.model_validate({"width": 16, "depth": 1, "head_dim": 8, "block": block}).build(5, 4, 0)
    assert bool((model.norm.gain == 1).all()) and bool((model.norm.bias == 0).all())
    decayed = {name for group in decay_groups(model, 0.1) if group.weight_decay for name in group.parameters}
    assert not any("norm" in name for name in decayed)
    bare = DecoderConfig.model_validate(
        {
            "width": 16,
            "depth": 1,
            "head_dim": 8,
            "block": {"norm": {"kind": "layernorm", "scale": False, "bias": False}},
        }
    ).build(5, 4, 0)
    assert not any("norm" in name for name, _ in bare.named_parameters())
