"""Curvature of the loss along directions: uᵀ H u with u of length 1, from Hessian-vector products.

    H v = ∂/∂θ ⟨∇L(θ), v⟩                                       (Pearlmutter 1994: two backward passes, no matrix)
    sharpness of a step s:  uᵀ H u,  u = s / |s|                 the gradient by default

Plain gradient descent with rate η is stable along u while uᵀHu < 2/η. A river is a direction of small curvature and slow, steady
descent; the slopes of its valley are directions of large curvature.

    loss(parameters) -> scalar tensor, for example with `torch.func.functional_call`
    curvature(loss, parameters_of(model), difference(decayed, plateau))

`curvature_by_differences` needs no second derivative: it takes the change of the slope between θ ± εu, whose error is of order
ε² plus rounding / ε. It is the check, and the way for models with layers that are differentiable once only.

Pitfalls
  kernels   fused attention has no second derivative; `twice_differentiable` switches to the plain path.
  custom    a function of one's own that computes gradients in its forward pass has none either, and autograd does not always
            notice; where a model has such functions, compare with `curvature_by_differences`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchstone.diagnose.landscape.directions import dot, unit
from torchstone.diagnose.landscape.states import State, moved
from torchstone.errors import ConfigError


class NoSecondDerivative(ConfigError):
    """A layer on the way to the loss can be differentiated once only."""


# what autograd says of a layer that it can differentiate once only
_ONCE = re.compile(
    r"differentiate twice|does not currently support double backward|derivative for .* is not implemented"
)
TensorLoss = Callable[[dict[str, Tensor]], Tensor]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, scaled dot-product attention takes the plain path, which has second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def gradient(loss: TensorLoss, parameters: State) -> dict[str, Tensor]:
    """∇L at the parameters, detached; 0 where the loss does not depend on one."""
    leaves = _leaves(parameters)
    found = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
    return _filled(leaves, found)


def hessian_product(loss: TensorLoss, parameters: State, vector: State) -> dict[str, Tensor]:
    """H v, detached; tensors that `vector` lacks count as 0 there.

    Raises:
        ConfigError: `vector` names no parameter. NoSecondDerivative: a layer can be differentiated once only.
    """
    _require_shared(parameters, vector)
    leaves = _leaves(parameters)
    values = list(leaves.values())
    with twice_differentiable():
        value = loss(leaves)
        try:
            first = torch.autograd.grad(value, values, create_graph=True, allow_unused=True)
            slope = _slope(leaves, first, vector)
            if slope.requires_grad:
                slope.backward()  # `grad` would pass over a layer that refuses here, and count it as 0
        except RuntimeError as error:
            if not _ONCE.search(str(error)):
                raise
            raise NoSecondDerivative(
                f"the loss has no second derivative ({str(error).splitlines()[0]}); use curvature_by_differences."
            ) from error
    return _filled(leaves, tuple(value.grad for value in values))


def _slope(leaves: State, gradients: tuple[Tensor | None, ...], vector: State) -> Tensor:
    """⟨∇L, v⟩, differentiable."""
    parts = [
        (value * vector[name].to(value)).sum()
        for name, value in zip(leaves, gradients, strict=True)
        if value is not None and name in vector
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def curvature(loss: TensorLoss, parameters: State, direction: State) -> float:
    """uᵀHu along a direction of any length, exact to rounding.

    Raises:
        ConfigError: see `hessian_product`; or the direction is zero among the parameters.
    """
    u = unit(_restricted(parameters, direction))
    return dot(hessian_product(loss, parameters, u), u)


def curvature_by_differences(loss: TensorLoss, parameters: State, direction: State, epsilon: float = 1e-2) -> float:
    """uᵀHu from slopes along u at θ ± εu.

    Args:
        epsilon: distance in weights; a hundredth suits fp32, 1e-4 fp64.
    """
    u = unit(_restricted(parameters, direction))
    ahead, behind = (dot(gradient(loss, moved(parameters, u, far)), u) for far in (epsilon, -epsilon))
    return (ahead - behind) / (2 * epsilon)


def step_sharpness(loss: TensorLoss, parameters: State, step: State | None = None) -> float:
    """Curvature along a step: an optimizer's update, or the gradient where none is given."""
    return curvature(loss, parameters, gradient(loss, parameters) if step is None else step)


def _leaves(parameters: State) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def _filled(leaves: State, found: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(leaf) if value is None else value.detach()
        for (name, leaf), value in zip(leaves.items(), found, strict=True)
    }


def _restricted(parameters: State, direction: State) -> dict[str, Tensor]:
    _require_shared(parameters, direction)
    return {name: direction[name] for name in parameters if name in direction}


def _require_shared(parameters: State, vector: State) -> None:
    if not parameters.keys() & vector.keys():
        raise ConfigError(
            f"the direction has no tensor of the parameters (it has {', '.join(list(vector)[:3]) or 'none'}; the parameters are "
            f"{', '.join(list(parameters)[:3])} …); take it between two states of the same model."
        )
