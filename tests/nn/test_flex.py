"""The bias computed score by score, as the CUDA kernel would, equals the eager core (on the CPU, without the compiler)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchstone.nn.attention.bias import parallel_bias
from torchstone.nn.attention.core import eager_attention
from torchstone.nn.attention.difference import Difference
from torchstone.nn.attention.flex import fits_flex, flex_attention
from torchstone.nn.attention.mask import CAUSAL, parallel_mask
from torchstone.nn.attention.observe import Observation
from torchstone.nn.initialisation import generator_for
from torchstone.nn.position.base import PositionContext
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

LENGTH, HEADS, CHANNELS, SCALE = 130, 4, 16, 0.25
SPANS = {
    "causal": Span(),
    "documents": Span(
        positions_bt=torch.cat([torch.arange(70), torch.arange(60)]).expand(2, -1),
        documents_bt=torch.cat([torch.zeros(70), torch.ones(60)]).long().expand(2, -1),
    ),
    "left padding": Span(
        positions_bt=(torch.arange(LENGTH) - torch.tensor([[0], [40]])).clamp_min(0),
        valid_bt=torch.arange(LENGTH) >= torch.tensor([[0], [40]]),
    ),
}


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator_for(0, name))


def _position(kind: str, heads: int) -> Any:
    settings = {"kind": kind, "width": 4} if kind == "fire" else {"kind": kind}
    position = parse_part("position", settings).build(PositionContext(CHANNELS, heads, LENGTH))  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in position.named_parameters():
            parameter.uniform_(0.1, 1.0, generator=generator_for(1, name))
    return position


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("span", "window", "pairs"),
    [
        ("causal", None, None),
        ("causal", 9, True),
        ("causal", None, False),
        ("documents", None, True),
        ("documents", 9, None),
        ("left padding", 9, False),
    ],
)
@pytest.mark.parametrize("kind", ["alibi", "kerple", "fire"])
@torch.no_grad()
def test_equals_eager(kind: str, span: str, window: int | None, pairs: bool | None) -> None:
    """`pairs`: one map per head, neighbouring sub-heads of a head, or first maps before second maps."""
    heads = HEADS if pairs is None else HEADS // 2
    position = _position(kind, heads)
    difference = None if pairs is None else Difference(torch.full((1, 1, 1), 0.3), pairs)
    q, v = draw("q", 2, HEADS, LENGTH, CHANNELS), draw("v", 2, 2, LENGTH, CHANNELS)
    k, opened = draw("k", 2, 2 if pairs is None else HEADS, LENGTH, CHANNELS), SPANS[span].opened()
    mask = parallel_mask(opened, LENGTH, window, q.device)
    bias = parallel_bias(position, opened, LENGTH, q.device)
    assert bias is not None
    term = bias.term()
    assert term is not None
    values = v if difference is None else difference.share(v)
    ours = flex_attention(q, k, values, mask, SCALE, term, pairs)
    ours = ours if difference is None else difference.subtract(ours)
    theirs = mask.clear_empty(eager_attention(q, k, v, mask, SCALE, difference, 0.0, Observation(), bias))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["alibi", "kerple"])
def test_gradient_of_the_term_is_that_of_the_bias(kind: str) -> None:
    """torch has no gradient of this kernel on the CPU; the function that it would differentiate has."""
    position = _position(kind, HEADS)
    bias = parallel_bias(position, Span(), 9, torch.device("cpu"))
    assert bias is not None
    term = bias.term()
    assert term is not None
    h, i, j = torch.meshgrid(torch.arange(HEADS), torch.arange(9), torch.arange(9), indexing="ij")
    ours, theirs = term(torch.zeros_like(h), h, i, j), bias.whole()[0]
    torch.testing.assert_close(ours, theirs)
    learned = list(position.parameters())
    if learned:
        cotangent = draw("cotangent", HEADS, 9, 9)
        ours, theirs = (torch.autograd.grad(x, learned, cotangent) for x in (ours, theirs))
        torch.testing.assert_close(ours, theirs)


def test_fire_with_gradients_holds_its_bias() -> None:
    position = parse_part("position", "fire").build(PositionContext(CHANNELS, HEADS, LENGTH))  # type: ignore[attr-defined]
    bias = parallel_bias(position, Span(), LENGTH, torch.device("cpu"))
    assert bias is not None and bias.term() is None
    with torch.no_grad():
        assert bias.term() is not None


def test_the_cpu_does_not_use_it() -> None:
    assert not fits_flex(draw("q", 1, HEADS, LENGTH, CHANNELS), CAUSAL)
