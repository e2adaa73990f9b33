"""Routers: choice of experts, ties, refused settings, auxiliary losses and who counts in them, fp32 under autocast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.context import BuildContext
from torchstone.nn.experts.balance import balance_loss, load, statistics, z_loss
from torchstone.nn.experts.choice import choose
from torchstone.nn.experts.reference import auxiliary_losses, route
from torchstone.nn.experts.router import RoutedPart, Router
from torchstone.nn.span import Span

ORDERS = ("topk-softmax", "softmax-topk")


def logits(tokens: int = 20, experts: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router(width: int = 12, **settings: Any) -> Router:
    made = Router(BuildContext(width, width, 1, 0, 10, 8), RoutedPart(kind="routed", **{"num_experts": 6, **settings}))
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(3))
    return made


def inputs(batch: int = 3, length: int = 5, width: int = 12) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


def decoder(**settings: Any) -> Decoder:
    block = {"mixer": {"kind": "moa", **settings}, "feedforward": {"kind": "smoe", "hidden": 8, **settings}}
    config = {"width": 16, "depth": 2, "head_dim": 8, "block": block, "initialisation": {"kind": "normal", "std": 0.3}}
    return DecoderConfig.model_validate(config).build(20, 8, 0)


def auxiliary(model: Decoder) -> Tensor | None:
    return model(torch.arange(16).view(2, 8)).auxiliary


# Choice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_choice_equals_the_plain_reference(order: Any, top_k: int) -> None:
    z_ne = logits()
    z_ne[3] = 0.5  # every expert equal
    z_ne[4, [1, 5]] = 9.0  # two equal best ones
    routing = choose(z_ne, top_k, order)
    for token, z_e in enumerate(z_ne):
        expected = route(z_e, top_k, order)
        assert routing.experts_nk[token].tolist() == [expert for expert, _ in expected]
        torch.testing.assert_close(routing.gates_nk[token], torch.stack([gate for _, gate in expected]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [3, 8, 64])
def test_among_equal_logits_lower_indices_come_first(experts: int, dtype: torch.dtype) -> None:
    tied = choose(torch.zeros(40, experts, dtype=dtype), 2, "topk-softmax")
    assert torch.equal(tied.experts_nk, torch.tensor([[0, 1]]).expand(40, 2))


def test_both_orders_are_one_function_when_gates_are_renormalised() -> None:
    first, second = logits().requires_grad_(), logits().requires_grad_()
    left = choose(first, 3, "topk-softmax")
    right = choose(second, 3, "softmax-topk", renormalise=True)
    torch.testing.assert_close(left.gates_nk, right.gates_nk)
    (left.gates_nk[:, 0].sum() + left.gates_nk[:, 2].square().sum()).backward()
    (right.gates_nk[:, 0].sum() + right.gates_nk[:, 2].square().sum()).backward()
    assert first.grad is not None
    torch.testing.assert_close(first.grad, second.grad)


def test_one_expert_learns_from_the_task_only_under_softmax_topk() -> None:
    z_ne = logits().requires_grad_()
    choose(z_ne, 1, "softmax-topk").gates_nk.sum().backward()
    assert z_ne.grad is not None and z_ne.grad.abs().amax(1).min() > 0
    other = logits().requires_grad_()
    choose(other, 1, "topk-softmax").gates_nk.sum().backward()
    assert other.grad is not None and not other.grad.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 7}, "top_k is 7 and there are 6 experts"),
        ({"top_k": 1}, "no gradient from the task"),
        ({"top_k": 1, "router": "softmax-topk", "renormalise": True}, "no gradient from the task"),
        ({"renormalise": True}, "renormalise has no meaning under router topk-softmax"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        router(**settings)


# Auxiliary losses ---------------------------------------------------------------------------------


def test_losses_equal_the_plain_reference() -> None:
    z_ne = logits()
    routing = choose(z_ne, 2, "topk-softmax")
    balance, z = auxiliary_losses(z_ne, 2)
    torch.testing.assert_close(balance_loss(routing, None), balance)
    torch.testing.assert_close(z_loss(routing, None), z)


def test_balance_is_one_for_uniform_load_and_the_number_of_experts_when_one_takes_all() -> None:
    even_ne = torch.eye(6).repeat(5, 1) * 1e-9
    even = choose(even_ne, 1, "softmax-topk")
    assert balance_loss(even, None).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = choose(torch.eye(6)[[2] * 10] * 100, 1, "softmax-topk")
    assert balance_loss(collapsed, None).item() == pytest.approx(6.0, abs=1e-6)


def test_only_probabilities_have_a_gradient_in_the_balance_loss() -> None:
    z_ne, again = logits().requires_grad_(), logits().requires_grad_()
    routing = choose(z_ne, 2, "topk-softmax")
    balance_loss(routing, None).backward()
    (load(routing, None).detach() * again.softmax(-1).mean(0)).sum().backward()
    assert z_ne.grad is not None
    torch.testing.assert_close(z_ne.grad, again.grad)


def test_large_logits_do_not_overflow() -> None:
    z_ne = (logits().float() * 1000).requires_grad_()
    loss = z_loss(choose(z_ne, 2, "topk-softmax"), None)
    loss.backward()
    assert loss.isfinite() and z_ne.grad is not None and z_ne.grad.isfinite().all()


def test_padding_counts_in_no_loss_and_no_statistic() -> None:
    z_ne, valid_n = logits(), torch.arange(20) % 3 != 0
    whole, rest = choose(z_ne, 2, "topk-softmax"), choose(z_ne[valid_n], 2, "topk-softmax")
    for number in (balance_loss, z_loss, load):
        torch.testing.assert_close(number(whole, valid_n), number(rest, None))
    torch.testing.assert_close(statistics(whole, valid_n).entropy, statistics(rest, None).entropy)
    nothing = torch.zeros(20, dtype=torch.bool)
    assert balance_loss(whole, nothing) == 0 and z_loss(whole, nothing) == 0


def test_no_tokens_have_losses_of_zero_with_gradients_of_zero() -> None:
    z_ne = logits(tokens=0).requires_grad_()
    routing = choose(z_ne, 2, "topk-softmax")
    for valid_n in (None, torch.zeros(0, dtype=torch.bool)):
        assert balance_loss(routing, valid_n) == 0 and z_loss(routing, valid_n) == 0
        assert statistics(routing, valid_n).numbers() == {
            "router_entropy": 0.0, "load_max": 0.0, "load_min": 0.0, "dead_experts": 6.0,
        }  # fmt: skip
    (balance_loss(routing, None) + z_loss(routing, None)).backward()
    assert z_ne.grad is not None and z_ne.grad.shape == (0, 6)


def test_a_router_leaves_both_losses_times_their_coefficients() -> None:
    made, x_btd = router(balance_coef=0.5, z_coef=0.25), inputs()
    valid_bt = torch.tensor([[True] * 5, [False, False, True, True, True], [False] * 4 + [True]])
    span = Span(valid_bt=valid_bt).opened()
    routing = made(x_btd, span)
    valid_n = valid_bt.flatten()
    left = span.left()
    assert left is not None
    torch.testing.assert_close(left, 0.5 * balance_loss(routing, valid_n) + 0.25 * z_loss(routing, valid_n))


def test_without_coefficients_nothing_is_left() -> None:
    assert auxiliary(decoder(balance_coef=0.0, z_coef=0.0)) is None
    assert auxiliary(decoder(balance_coef=0.0)) is not None


def test_mean_divides_by_the_routers_of_the_model() -> None:
    whole, mean = auxiliary(decoder()), auxiliary(decoder(aux_reduction="mean"))
    assert whole is not None and mean is not None
    torch.testing.assert_close(mean, whole / 4)  # two layers, both halves of each


def test_routers_are_counted_where_only_some_layers_have_them() -> None:
    block = {"feedforward": "swiglu"}
    moa = {"kind": "moa", "aux_reduction": "mean"}
    config = {"width": 16, "depth": 3, "head_dim": 8, "block": block, "pattern": ["attention", moa, moa]}
    model = DecoderConfig.model_validate(config).build(20, 8, 0)
    assert {module._census[0].routers for module in model.modules() if isinstance(module, Router)} == {2}


# Precision and numbers ----------------------------------------------------------------------------


def test_autocast_changes_no_choice() -> None:
    made, x_btd = router(), inputs()
    plain = made(x_btd, Span())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = made(x_btd, Span())
    assert cast.logits_ne.dtype == cast.gates_nk.dtype == torch.float32
    assert torch.equal(cast.logits_ne, plain.logits_ne) and torch.equal(cast.gates_nk, plain.gates_nk)


def test_weights_stay_fp32_in_a_model_of_half_precision() -> None:
    made, x_btd = router().bfloat16(), inputs().bfloat16()
    assert made.weight.dtype == torch.float32
    routing = made(x_btd, Span())
    torch.testing.assert_close(routing.logits_ne, x_btd.flatten(0, 1).float() @ made.weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_stay_fp32_with_their_weights(dtype: torch.dtype) -> None:
    made, x_btd = router(), inputs()
    made(x_btd, Span()).logits_ne.square().sum().backward()
    assert made.weight.grad is not None
    weight, gradient = made.weight.detach().clone(), made.weight.grad.clone()
    made.to(dtype)
    assert made.weight.grad is not None and torch.equal(made.weight.grad, gradient)
    torch.optim.SGD(made.parameters(), lr=0.5).step()
    torch.testing.assert_close(made.weight.detach(), weight - 0.5 * gradient, rtol=1e-6, atol=1e-6)
    made.double()
    assert made.weight.grad is not None and made.weight.grad.dtype == made.weight.dtype == torch.float64


def test_diagnostics_say_load_entropy_and_dead_experts() -> None:
    made, x_btd = router(), inputs()
    assert made.diagnostics() == {}
    with torch.no_grad():
        made.weight[:2].fill_(0.0)
        made.weight[2:4] = torch.eye(12)[0] * 50
        made.weight[4:] = -torch.eye(12)[0] * 50
    made(x_btd, Span())
    numbers = made.diagnostics()
    positive = float((x_btd[..., 0] > 0).float().mean())
    assert numbers["load_max"] == pytest.approx(3 * max(positive, 1 - positive), rel=1e-5)
    assert numbers["load_min"] == 0.0 and numbers["dead_experts"] == 2.0
    assert 0 < numbers["router_entropy"] < math.log(6)
