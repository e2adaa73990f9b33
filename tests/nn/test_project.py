"""Dense maps: computed together as alone, in any order of outputs, with and without biases; what modules say of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.feedforward.gated import two_thirds
from torchstone.nn.project import layer_flops, matrices, project, roles
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part, part_class

CONTEXT = BuildContext(width=24, head_dim=8, depth=2, layer=1, vocab_size=10, length=16)


class Doubled(nn.Module):
    """A dense map of another kind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)

    def flops(self) -> float:
        return 7.0


def reverse(rows: Tensor) -> Tensor:
    return rows.flip(0)


@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("length", [1, 4, 9])  # few tokens go another way
def test_linear_maps_together_are_the_maps_alone(biases: tuple[bool, bool], length: int) -> None:
    layers = [nn.Linear(6, size, bias=bias) for size, bias in zip((5, 3), biases, strict=True)]
    x_btd = torch.randn(2, length, 6)
    first, second = project(x_btd, *layers, arrange=(reverse, None))
    torch.testing.assert_close(first, layers[0](x_btd).flip(-1))
    torch.testing.assert_close(second, layers[1](x_btd))


def test_other_maps_are_called_one_by_one_and_reordered_at_their_outputs() -> None:
    layers = [Doubled(6, 4), nn.Linear(6, 3)]
    x_btd = torch.randn(2, 5, 6)
    first, second = project(x_btd, *layers, arrange=(reverse, None))
    torch.testing.assert_close(first, layers[0](x_btd).flip(-1))
    torch.testing.assert_close(second, layers[1](x_btd))


def test_what_a_parent_says_of_its_maps() -> None:
    parent = nn.Module()
    parent.w_q, parent.w_o = nn.Linear(6, 4, bias=True), Doubled(4, 6)
    assert matrices(parent, "w_q", "w_o") == ("w_q.weight", "w_o.inner.weight")
    assert roles(parent, {"w_o": "attention_vo"}) == {"w_o.inner.weight": "attention_vo"}
    assert (layer_flops(parent.w_q), layer_flops(parent.w_o)) == (48.0, 7.0)


@pytest.mark.parametrize(
    ("kind", "bias"), [("swiglu", False), ("geglu", False), ("geglu", True), ("mlp", False), ("mlp", True)]
)
def test_dense_feedforwards(kind: str, bias: bool) -> None:
    settings = {"kind": kind, "hidden": 20} | ({"bias": True} if bias else {})
    layer = parse_part("feedforward", settings).build(CONTEXT)  # type: ignore[attr-defined]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x_btd = torch.randn(2, 3, 24)
    if kind == "mlp":
        expected = layer.w_out(nn.functional.gelu(layer.w_in(x_btd)))
    else:
        gate = nn.functional.silu if kind == "swiglu" else lambda x: nn.functional.gelu(x, approximate="tanh")
        expected = layer.w_down(gate(layer.w_gate(x_btd)) * layer.w_up(x_btd))
    torch.testing.assert_close(layer(x_btd, Span()), expected)
    assert layer.flops() == sum(2 * p.numel() for p in layer.parameters() if p.dim() == 2)
    names = dict(layer.named_parameters())
    assert set(layer.parameter_roles()) == {name for name, p in names.items() if p.dim() == 2}
    assert set(layer.residual_parameters()) < set(names)


def test_hidden_widths_chosen_by_null() -> None:
    assert parse_part("feedforward", "swiglu").width_of(96) == two_thirds(96, 8) == 256  # type: ignore[attr-defined]
    assert parse_part("feedforward", "geglu").width_of(96) == 256  # type: ignore[attr-defined]
    assert parse_part("feedforward", "mlp").width_of(96) == 384  # type: ignore[attr-defined]


def test_shared_modules_are_made_once_per_model() -> None:
    shared = nn.ModuleDict()
    contexts = [BuildContext(24, 8, 2, layer, 10, 16, None, shared) for layer in range(2)]
    first, second = (context.share("bounds", lambda: nn.Linear(2, 2)) for context in contexts)
    assert first is second is shared["bounds"]
    assert CONTEXT.share("bounds", lambda: nn.Linear(2, 2)) is not CONTEXT.share("bounds", lambda: nn.Linear(2, 2))


def test_an_experts_width_is_not_taken_for_a_layers() -> None:
    smoe = {"kind": "smoe", "hidden": 16, "bias": True}
    for kind in ("swiglu", "geglu", "mlp"):
        assert part_class("feedforward", kind).inherit(smoe) == {}
    assert part_class("feedforward", "geglu").inherit({"kind": "swiglu", "hidden": 16}) == {"hidden": 16}
