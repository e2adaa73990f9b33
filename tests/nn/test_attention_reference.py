"""Attention mixers equal the plain loops of `nn.attention.reference`: outputs and gradients, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from torchstone.nn.attention import core, reference
from torchstone.nn.attention.observe import observe
from torchstone.nn.context import BuildContext
from torchstone.nn.initialisation import generator_for
from torchstone.nn.position.base import Offsets
from torchstone.nn.position.rotary import Layout, Rotary, turn
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

WIDTH, LENGTH = 24, 9
CASES = [
    pytest.param("attention", {}, (4, 4), id="mha"),
    pytest.param("attention", {}, (4, 2), id="gqa"),
    pytest.param("attention", {"position": "none"}, (4, 1), id="mqa without position"),
    pytest.param("differential", {}, (2, 2), id="v1 mha"),
    pytest.param("differential", {"lambda_init": 0.3}, (4, 2), id="v1 gqa flash"),
    pytest.param("differential", {"kv_pairing": "naive"}, (6, 2), id="v1 gqa naive"),
    pytest.param("differential", {"version": "v2"}, (2, 2), id="v2 mha"),
    pytest.param("differential", {"version": "v2"}, (4, 2), id="v2 gqa"),
    pytest.param("attention", {"position": "alibi"}, (4, 2), id="gqa alibi"),
    pytest.param("attention", {"position": "kerple"}, (4, 4), id="mha kerple"),
    pytest.param("attention", {"position": "fire"}, (3, 1), id="mqa fire"),
    pytest.param("differential", {"position": "kerple"}, (4, 2), id="v1 gqa flash kerple"),
    pytest.param("differential", {"kv_pairing": "naive", "position": "fire"}, (6, 2), id="v1 gqa naive fire"),
    pytest.param("differential", {"version": "v2", "position": "kerple"}, (4, 2), id="v2 gqa kerple"),
]


def _expected(mixer: Any, config: Any, x_btd: Tensor, weights: dict[str, Tensor], heads: tuple[int, int]) -> Tensor:
    layout: Layout = getattr(mixer.position, "layout", "half")

    def rotate(x_td: Tensor) -> Tensor:
        if not isinstance(mixer.position, Rotary):
            return x_td
        cos_t1c, sin_t1c = mixer.position.tables(Span(), LENGTH, 0, x_td.device)
        return turn(x_td[:, None], cos_t1c, sin_t1c, layout)[:, 0]

    plain = [weights[name] for name in ("w_q.weight", "w_k.weight", "w_v.weight", "w_o.weight")]
    tokens = torch.arange(LENGTH)
    bias = mixer.position.bias(Offsets(tokens[:, None] - tokens, tokens))
    if bias is None:
        bias = x_btd.new_zeros(heads[0], LENGTH, LENGTH)
    run: Callable[[Tensor], Tensor]
    if config.kind == "attention":
        run = lambda x: reference.attention(x, *plain, heads, rotate, bias)  # noqa: E731
    elif config.version == "v1":
        run = lambda x: reference.differential_v1(  # noqa: E731
            x, weights, heads, mixer.lambda_init, rotate, bias, config.kv_pairing
        )
    else:
        run = lambda x: reference.differential_v2(x, weights, heads, rotate, bias)  # noqa: E731
    return torch.stack([run(x) for x in x_btd])


@pytest.mark.parametrize("path", ["eager", "blocked", "fused"])
@pytest.mark.parametrize(("kind", "settings", "heads"), CASES)
def test_equals_reference(
    kind: str, settings: dict[str, Any], heads: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_part("mixer", {"kind": kind, "heads": heads[0], "kv_heads": heads[1], "head_dim": 4, **settings})
    mixer = config.build(BuildContext(WIDTH, 4, 2, 1, 10, LENGTH)).double()  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.normal_(0.0, 0.5, generator=generator_for(0, name))
    monkeypatch.setattr(core, "_blocked", lambda q, mask, *others: path == "blocked" and mask.causal)
    x_btd = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=generator_for(0, "x")).requires_grad_()
    weights = dict(mixer.named_parameters())
    with observe(mixer) if path == "eager" else nullcontext():
        ours = mixer(x_btd, Span())[0]
    theirs = _expected(mixer, config, x_btd, weights, heads)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    cotangent = torch.randn(ours.shape, dtype=torch.float64, generator=generator_for(0, "cotangent"))
    inputs = [x_btd, *weights.values()]
    for left, right in zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("biased_rows", [0, 1, 2])
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("length", [1, 33, 150])
def test_blocked_operator(maps: int, length: int, biased_rows: int) -> None:
    from torchstone.nn.attention.blocked import blocked_attention

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator_for(1, name)).requires_grad_()

    q, k = draw("q", 2, maps, 3, length, 4), draw("k", 2, maps, 3, length, 4)
    v, lam = draw("v", 2, 3, length, 5), draw("lambda", 2, 3, length) if maps == 2 else None
    bias = draw("bias", biased_rows, 3, length, length) if biased_rows else None
    tokens = torch.arange(length)
    windowed = (tokens[:, None] >= tokens) & (tokens[:, None] - tokens < 7)
    for allowed in (None, windowed[None, None]):
        visible = tokens[:, None] >= tokens if allowed is None else windowed
        scores = 0.3 * q @ k.mT if bias is None else 0.3 * q @ k.mT + bias[:, None]
        softmax = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        weights = softmax[:, 0] if lam is None else softmax[:, 0] - lam[..., None] * softmax[:, 1]
        ours, theirs = blocked_attention(q, k, v, lam, allowed, 0.3, bias), weights @ v
        torch.testing.assert_close(ours, theirs)
        inputs = [x for x in (q, k, v, lam, bias) if x is not None]
        for left, right in zip(
            torch.autograd.grad(ours.pow(2).sum(), inputs),
            torch.autograd.grad(theirs.pow(2).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(left, right)


def test_blocked_operator_is_declared_correctly() -> None:
    from torchstone.nn.attention.blocked import _attention

    q, k, v = (torch.randn(2, 2, 3, 40, 4).requires_grad_() for _ in range(3))
    lam = torch.rand(1, 1, 1).requires_grad_()
    bias = torch.randn(1, 3, 40, 40).requires_grad_()
    for given in (None, bias):
        torch.library.opcheck(_attention, (q, k, v[:, 0], lam, None, given, 0.5, True))
