"""Layers of experts: the plain reference, both dispatches, tokens that come, go and stay alone, kernels, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchstone.errors import ConfigError
from torchstone.models.counts import count
from torchstone.models.decoder import DecoderConfig
from torchstone.nn.context import BuildContext
from torchstone.nn.experts import parallel
from torchstone.nn.experts.parallel import expert_linear
from torchstone.nn.experts.reference import smoe
from torchstone.nn.experts.smoe import SMoE, SMoEConfig
from torchstone.nn.feedforward.swiglu import SwiGLUConfig
from torchstone.nn.span import Span
from torchstone.recipe.load import load_recipe

WIDTH = 16
SHAPES = {"8 of 2": (8, 2), "4 of 3": (4, 3), "5 of 5": (5, 5), "64 of 2": (64, 2)}

every_shape = pytest.mark.parametrize("shape", SHAPES)
both_dispatches = pytest.mark.parametrize("dispatch", ["grouped", "loop"])


def layer(shape: str = "8 of 2", dispatch: str = "grouped", **settings: Any) -> SMoE:
    experts, top_k = SHAPES[shape]
    given = {"num_experts": experts, "top_k": top_k, "hidden": 12, "dispatch": dispatch, **settings}
    made = SMoEConfig.model_validate(given).build(BuildContext(WIDTH, 8, 1, 0, 10, 8)).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return made


def inputs(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(made: nn.Module, x_btd: Tensor, span: Span | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of a loss that every output enters, auxiliary losses included."""
    x_btd = x_btd.clone().requires_grad_()
    span = (Span() if span is None else span).opened()
    y_btd = made(x_btd, span)
    weight = torch.linspace(-1, 2, y_btd.numel(), dtype=y_btd.dtype).view(y_btd.shape)
    left = span.left()
    assert left is not None
    (y_btd.mul(weight).sum() + left).backward()
    found = {name: parameter.grad for name, parameter in made.named_parameters()} | {"x": x_btd.grad}
    assert all(value is not None for value in found.values())
    return y_btd.detach(), {name: value for name, value in found.items() if value is not None}


def close(left: Any, right: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


@every_shape
@both_dispatches
def test_equals_the_plain_reference(shape: str, dispatch: str) -> None:
    made, x_btd = layer(shape, dispatch, balance_coef=0.0, z_coef=0.0), inputs()
    assert made.bias is not None
    weights: list[Tensor] = [made.router.weight, made.w_in, made.w_out, made.bias]
    ours = made(x_btd, Span())
    theirs = smoe(x_btd.flatten(0, 1), weights, made.top_k).view(x_btd.shape)
    close(ours, theirs)
    found = torch.autograd.grad(ours.square().sum(), weights)
    close(found, torch.autograd.grad(theirs.square().sum(), weights))


@every_shape
def test_loop_equals_grouped(shape: str) -> None:
    x_btd = inputs()
    grouped, loop = (gradients(layer(shape, dispatch), x_btd) for dispatch in ("grouped", "loop"))
    close(grouped, loop)


@both_dispatches
def test_all_experts_kept_is_a_weighted_sum_of_dense_layers(dispatch: str) -> None:
    made, x_btd = layer("5 of 5", dispatch), inputs()
    assert made.bias is not None
    gates_bte = (x_btd @ made.router.weight.T).softmax(-1)
    a, c = torch.einsum("btd,efd->btef", x_btd, made.w_in).chunk(2, -1)
    dense = torch.einsum("btef,edf,bte->btd", nn.functional.silu(a) * c, made.w_out, gates_bte) + made.bias
    close(made(x_btd, Span()), dense)


@both_dispatches
@torch.no_grad()
def test_order_of_tokens_does_not_matter(dispatch: str) -> None:
    made, x_btd = layer(dispatch=dispatch), inputs()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    close(made(x_btd[:, order], Span()), made(x_btd, Span())[:, order])


@both_dispatches
@torch.no_grad()
def test_one_token_alone_equals_the_batch(dispatch: str) -> None:
    made, x_btd = layer(dispatch=dispatch), inputs()
    alone = torch.cat([made(x_btd[1:, t : t + 1], Span()) for t in range(9)], dim=1)
    close(alone, made(x_btd, Span())[1:])


@both_dispatches
def test_masking_equals_removing(dispatch: str) -> None:
    x_btd, valid_bt = inputs(), torch.arange(9).expand(2, 9) >= torch.tensor([[4], [1]])
    whole, found = gradients(layer(dispatch=dispatch), x_btd, Span(valid_bt=valid_bt))
    assert torch.equal(whole[~valid_bt], torch.zeros(5, WIDTH, dtype=torch.float64))
    assert not found["x"][~valid_bt].any()
    made = layer(dispatch=dispatch)
    rest_1nd, span = x_btd[valid_bt].unsqueeze(0).requires_grad_(), Span().opened()
    y_1nd = made(rest_1nd, span)
    close(whole[valid_bt], y_1nd[0].detach())
    weight = torch.linspace(-1, 2, whole.numel(), dtype=whole.dtype).view(whole.shape)[valid_bt]
    left = span.left()
    assert left is not None
    (y_1nd[0].mul(weight).sum() + left).backward()
    removed = {name: parameter.grad for name, parameter in made.named_parameters()}
    close({**removed, "x": rest_1nd.grad[0]}, {**found, "x": found["x"][valid_bt]})  # type: ignore[index]


@both_dispatches
def test_experts_without_tokens_get_gradients_of_zero(dispatch: str) -> None:
    made = layer(dispatch=dispatch)
    with torch.no_grad():
        made.router.weight[2:] = 0
        made.router.weight[:2] = 0
        made.router.weight[0, 0] = 1.0
        made.router.weight[1, 0] = 0.5
    x_btd = inputs()
    x_btd[..., 0] = 3.0  # experts 0 and 1, always
    _, found = gradients(made, x_btd)
    for name in ("w_in", "w_out"):
        assert found[name][:2].any() and torch.equal(found[name][2:], torch.zeros_like(found[name][2:]))
    assert found["router.weight"][2:].any()  # the auxiliary losses still reach them


def test_gradcheck() -> None:
    made, x_btd = layer("4 of 3"), inputs(1, 4).requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def run(x_btd: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x_btd, Span()))

    assert torch.autograd.gradcheck(run, (x_btd, *made.parameters()))


def test_compiled_in_one_graph() -> None:
    made, x_btd = layer(), inputs()
    expected, wanted = gradients(made, x_btd)
    made.zero_grad()
    found, grads = gradients(torch.compile(made, fullgraph=True, backend="aot_eager"), x_btd)  # type: ignore[arg-type]
    close(found, expected)
    close({name.removeprefix("_orig_mod."): value for name, value in grads.items()}, wanted)


def test_autocast_computes_products_in_half_precision_and_gradients_in_fp32() -> None:
    made, x_btd = layer().float(), inputs().float()
    expected, wanted = gradients(made, x_btd)
    made.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(x_btd, Span())
        assert found.dtype == torch.bfloat16
    close(found.float(), expected, 0.1)
    _, grads = gradients(made, x_btd)
    assert {value.dtype for value in grads.values()} == {torch.float32}
    close(grads, wanted, 1e-5)


# Kernels ------------------------------------------------------------------------------------------


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, matrices and ends, with experts that have none: the first, one inside and the last."""
    generator = torch.Generator().manual_seed(0)
    x_mi = torch.randn(19, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight_eoi = torch.randn(6, 8, 16, generator=generator, dtype=torch.float64).to(dtype)
    return x_mi, weight_eoi, torch.tensor([0, 7, 7, 12, 19, 19], dtype=torch.int32)


@pytest.mark.parametrize("kernel", [parallel.padded_product, parallel.grouped_product])
def test_every_product_equals_the_slices(kernel: Callable[..., Tensor]) -> None:
    x_mi, weight_eoi, ends_e = rows(torch.float32)
    close(kernel(x_mi, weight_eoi, ends_e), expert_linear(x_mi, weight_eoi, ends_e), 1e-5)


@pytest.mark.parametrize("kernel", [parallel.padded_outer, parallel.grouped_outer])
def test_every_gradient_of_matrices_equals_the_slices(kernel: Callable[..., Tensor]) -> None:
    x_mi, weight_eoi, ends_e = rows(torch.float32)
    weight_eoi.requires_grad_()
    y_mo = expert_linear(x_mi, weight_eoi, ends_e)
    grad_mo = torch.randn(y_mo.shape, generator=torch.Generator().manual_seed(2))
    y_mo.backward(grad_mo)
    found = kernel(grad_mo, x_mi, ends_e)
    close(found, weight_eoi.grad, 1e-5)
    assert not found[[0, 2, 5]].any()


def test_gradcheck_of_the_product() -> None:
    x_mi, weight_eoi, ends_e = rows()
    x_mi.requires_grad_(), weight_eoi.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: expert_linear(x, w, ends_e), (x_mi, weight_eoi))


def test_the_operators_are_what_torch_asks_of_operators() -> None:
    x_mi, weight_eoi, ends_e = rows()
    given = (x_mi.requires_grad_(), weight_eoi.requires_grad_(), ends_e)
    torch.library.opcheck(torch.ops.torchstone.expert_product.default, given)
    torch.library.opcheck(
        torch.ops.torchstone.expert_outer.default, (torch.ones(19, 8).double(), x_mi.detach(), ends_e)
    )


# Settings and counts ------------------------------------------------------------------------------


@both_dispatches
def test_flops_are_those_that_a_counter_sees(dispatch: str) -> None:
    made, x_btd = layer(dispatch=dispatch), inputs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x_btd, Span())
    assert counter.get_total_flops() == made.flops() * 18


@pytest.mark.parametrize("width", [64, 256, 512])
def test_experts_of_default_size_cost_what_a_dense_layer_costs(width: int) -> None:
    context = BuildContext(width, 64, 1, 0, 10, 8)
    sparse, dense = SMoEConfig().build(context), SwiGLUConfig().build(context)
    assert sparse.flops() - sparse.router.flops() == pytest.approx(dense.flops(), rel=0.03)


def recipe(*overrides: str) -> Any:
    plain = {"model": {"kind": "decoder", "width": 64, "head_dim": 16,
                       "block": {"feedforward": {"kind": "swiglu", "hidden": 192}}},
             "data": {"kind": "text", "tokenizer": "bytes", "length": 16}, "budget": {"steps": 1}}  # fmt: skip
    return load_recipe(plain, overrides)


def test_a_dense_width_is_not_the_width_of_an_expert() -> None:
    assert recipe("model.block.feedforward=smoe").model.block.feedforward.hidden is None
    changed = recipe("model.block.feedforward={kind: smoe, hidden: 40}", "model.block.feedforward.top_k=4")
    assert changed.model.block.feedforward.hidden == 40


def test_refusals_reach_the_reader_of_a_recipe() -> None:
    with pytest.raises(ConfigError, match="top_k is 9 and there are 8 experts"):
        recipe("model.block.feedforward={kind: smoe, top_k: 9}")


def test_parameters_of_jetmoe_8b() -> None:
    experts = {"num_experts": 8, "top_k": 2}
    config = DecoderConfig.model_validate(
        {
            "width": 2048,
            "depth": 24,
            "block": {
                "mixer": {"kind": "moa", "kv_heads": 16, "head_dim": 128, **experts},
                "feedforward": {"kind": "smoe", "hidden": 5632, **experts},
            },
        }
    )
    counts = count(config, 32000, 4096)
    assert counts.parameters / 1e9 == pytest.approx(8.52, abs=0.005)
    embeddings = 32000 * 2048
    assert (counts.active_parameters - embeddings) / 1e9 == pytest.approx(2.26, abs=0.03)
    maps = 24 * 4 * 32 * 128 * 4096  # scores and values of 32 query heads
    expected = 2 * counts.active_parameters + maps
    assert counts.forward_flops_per_token == pytest.approx(expected, rel=0.01)
