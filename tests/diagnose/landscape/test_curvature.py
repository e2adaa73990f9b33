"""Curvature: exact on a quadratic, equal to finite differences on networks, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from torchstone.diagnose.landscape.curvature import (
    NoSecondDerivative,
    curvature,
    curvature_by_differences,
    gradient,
    hessian_product,
    step_sharpness,
    twice_differentiable,
)
from torchstone.diagnose.landscape.directions import random_like, unit
from torchstone.diagnose.landscape.states import parameters_of
from torchstone.errors import ConfigError
from torchstone.models.decoder import DecoderConfig

H = torch.tensor([[5.0, 1.0, 0.0], [1.0, 3.0, -2.0], [0.0, -2.0, 4.0]], dtype=torch.float64)
C = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def quadratic(values: dict[str, Tensor]) -> Tensor:
    x = torch.cat([values["a"], values["b"]])
    return 0.5 * x @ H @ x + C @ x


def point(*x: float) -> dict[str, Tensor]:
    return {"a": torch.tensor(x[:1], dtype=torch.float64), "b": torch.tensor(x[1:], dtype=torch.float64)}


def joined(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state["a"], state["b"]])


def test_a_quadratic_has_its_own_hessian_everywhere() -> None:
    theta, v = point(0.3, -1.0, 2.0), point(1.0, 2.0, -1.0)
    torch.testing.assert_close(joined(gradient(quadratic, theta)), H @ joined(theta) + C)
    torch.testing.assert_close(joined(hessian_product(quadratic, theta, v)), H @ joined(v))
    exact = float(joined(v) @ H @ joined(v) / joined(v).norm() ** 2)
    assert curvature(quadratic, theta, v) == pytest.approx(exact, rel=1e-12)
    assert curvature(quadratic, theta, {name: 7 * value for name, value in v.items()}) == pytest.approx(
        exact, rel=1e-12
    )
    assert curvature_by_differences(quadratic, theta, v) == pytest.approx(exact, rel=1e-9)


def test_the_sharpness_of_a_step_is_the_curvature_along_it() -> None:
    theta = point(0.3, -1.0, 2.0)
    g = H @ joined(theta) + C
    assert step_sharpness(quadratic, theta) == pytest.approx(float(g @ H @ g / (g @ g)), rel=1e-12)
    assert step_sharpness(quadratic, theta, point(0.0, 0.0, 3.0)) == pytest.approx(4.0, rel=1e-12)


def test_a_part_of_the_parameters_and_a_loss_without_curvature() -> None:
    theta = point(0.0, 1.0, 1.0)
    found = hessian_product(quadratic, theta, {"a": torch.ones(1, dtype=torch.float64)})
    torch.testing.assert_close(joined(found), H[:, 0])

    def linear(values: dict[str, Tensor]) -> Tensor:
        return 2 * values["a"].sum()

    assert curvature(linear, theta, point(1.0, 1.0, 1.0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_decoder_agrees_with_finite_differences_and_with_the_second_difference_of_its_loss(
    dtype: torch.dtype,
) -> None:
    model = DecoderConfig(width=16, depth=2, head_dim=8).build(20, 12, seed=0).to(dtype)
    tokens_bt = torch.randint(20, (3, 13), generator=torch.Generator().manual_seed(0))

    def loss(values: dict[str, Tensor]) -> Tensor:
        hidden_btd = functional_call(model, values, (tokens_bt[:, :-1],)).hidden_btd
        logits_btv = hidden_btd @ values["embed.weight"].T
        return torch.nn.functional.cross_entropy(logits_btv.flatten(0, 1), tokens_bt[:, 1:].flatten())

    theta = parameters_of(model)
    u = unit(random_like(theta, 3))
    found = curvature(loss, theta, u)
    double = dtype == torch.float64
    by_slopes = curvature_by_differences(loss, theta, u, epsilon=1e-4 if double else 1e-2)
    assert found == pytest.approx(by_slopes, rel=1e-6 if double else 2e-2, abs=1e-8 if double else 2e-4)
    if double:
        low, mid, high = (float(loss({n: v + far * u[n] for n, v in theta.items()})) for far in (-1e-3, 0.0, 1e-3))
        assert found == pytest.approx((low - 2 * mid + high) / 1e-6, rel=1e-4)


class Once(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * g


def test_a_layer_without_second_derivative_is_named_and_differences_work() -> None:
    def loss(values: dict[str, Tensor]) -> Tensor:
        return Once.apply(values["a"]).square().sum()

    theta, v = point(0.5, 0.0, 0.0), point(1.0, 0.0, 0.0)
    with pytest.raises(NoSecondDerivative, match="no second derivative .* use curvature_by_differences"):
        curvature(loss, theta, v)
    assert curvature_by_differences(loss, theta, v) == pytest.approx(12 * 0.5**2, rel=1e-3)


class Broken(torch.autograd.Function):
    """A backward pass that fails for a reason of its own the second time."""

    @staticmethod
    def forward(ctx, x, error):  # type: ignore[no-untyped-def]
        ctx.error = error
        return x.square()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        raise ctx.error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory is left"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")]
)
def test_other_failures_pass_on(error: RuntimeError) -> None:
    theta, v = point(0.5, 0.0, 0.0), point(1.0, 0.0, 0.0)
    with pytest.raises(type(error), match=str(error)) as caught:
        curvature(lambda values: Broken.apply(values["a"], error).sum(), theta, v)
    assert not isinstance(caught.value, NoSecondDerivative)

    def failing(values: dict[str, Tensor]) -> Tensor:
        raise RuntimeError(
            "derivative for this text is not implemented"
        )  # of the loss itself, not of a second derivative

    with pytest.raises(RuntimeError, match="for this text"):
        curvature(failing, theta, v)


def test_attention_without_the_guard_has_no_second_derivative() -> None:
    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch._scaled_dot_product_flash_attention_for_cpu(*[values["q"]] * 3)[0].square().sum()

    q_bhtd = {"q": torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(NoSecondDerivative, match="derivative for .* is not implemented"):
        curvature(loss, q_bhtd, {"q": torch.ones(1, 2, 8, 8)})


def test_attention_has_second_derivatives_inside_the_guard() -> None:
    q_bhtd = torch.randn(1, 2, 8, 8, requires_grad=True, generator=torch.Generator().manual_seed(0))
    with twice_differentiable():
        out = torch.nn.functional.scaled_dot_product_attention(q_bhtd, q_bhtd, q_bhtd, is_causal=True)
        (first,) = torch.autograd.grad(out.square().sum(), q_bhtd, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q_bhtd)
    assert bool(second.isfinite().all()) and float(second.abs().sum()) > 0


def test_directions_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="the direction has no tensor of the parameters"):
        curvature(quadratic, point(0.0, 0.0, 0.0), {"other": torch.ones(3)})
    with pytest.raises(ConfigError, match="length 0 cannot be normalised"):
        curvature(quadratic, point(0.0, 0.0, 0.0), point(0.0, 0.0, 0.0))
