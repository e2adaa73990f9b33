"""A limit on relative representation change: lower rates for layers whose gradients agree (after Kosson et al., 2410.23922).

Early in training gradients of different samples point the same way: the signal-to-noise ratio Φ of a batch gradient is high, and
updates of a fixed size change every representation more than later, when noise averages out. From a layer's own moments, with
m̂ the bias-corrected average of its gradients (β) and B samples in a batch:

    r = ‖m̂‖² / average ‖g‖²;   κ = (1−β)/(1+β);   Φ = max(0, (r − κ)/(1 − r));   ρ = √((1 + Φ/B) / (1 + Φ))

For a linear neuron, a rate ρ η keeps the expected response of a sample of the batch, relative to its input, what it is at η for
Φ → 0. Φ ≪ 1 leaves the rate; Φ ≫ B divides it by √B, so that a larger batch gains nothing: B/Φ is the critical batch size. ρ is
clamped to [0.01, 1] and averaged over about ten steps.

The derivation is this project's, after the paper's qualitative result that such a correction reduces the benefit of warmup
without removing it.

Pitfalls: at the first step r is 1, whatever the gradient: ρ starts at 1/√B, and Φ is an overestimate for the first 1/(1−β)
steps. A "layer" is a parameter tensor. Clipping changes the gradients that Φ is estimated from. Under `angle_schedule: sqrt` a
rotation is scaled by √ρ, since it follows √η.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.errors import ConfigError
from torchstone.optim.momentum import MomentumOptimizer

STEPS, SQUARE, FACTOR = "rrc_steps", "rrc_square", "rrc_factor"
"""Keys of a parameter's state: measurements so far, and raw averages of ‖g‖² and ρ."""


def signal_to_noise(ratio: float, beta: float) -> float:
    """Φ of a batch gradient from r = ‖m̂‖²/average ‖g‖²; infinite where r reaches 1."""
    kappa = (1 - beta) / (1 + beta)
    if ratio <= kappa:
        return 0.0
    return math.inf if ratio >= 1 else (ratio - kappa) / (1 - ratio)


def rate_factor(snr: float, batch_size: int) -> float:
    """ρ at a signal-to-noise ratio Φ of the batch."""
    if math.isinf(snr):
        return 1 / math.sqrt(batch_size)
    return math.sqrt((1 + snr / batch_size) / (1 + snr))


class RRCLimiter:
    """Scales the rate of every parameter of an optimizer by its ρ, from now on.

    It hooks into `step` and keeps its averages in the optimizer's state, so that `state_dict` holds them. A torch optimizer
    updates every parameter as usual, and the limiter then takes the share ρ of the way, which is the update at the rate ρ η,
    decay included.

    Args:
        optimizer: one of ours, or torch's Adam or AdamW.
        batch_size: independent samples B of a batch.
        average: decay of the averages of ρ, 0.9 for about ten steps.
        least: lower clamp of ρ.

    Raises:
        ConfigError: the optimizer keeps no average of gradients, or one through which decay goes too; a value is out of range.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, batch_size: int, average: float = 0.9, least: float = 0.01
    ) -> None:
        if not isinstance(optimizer, MomentumOptimizer | torch.optim.Adam | torch.optim.AdamW):
            raise ConfigError(
                f"the limit on relative representation change reads an optimizer's average of gradients, and "
                f"{type(optimizer).__name__} was given; it knows torchstone's optimizers and torch's Adam and AdamW."
            )
        if batch_size < 2 or not 0 <= average < 1 or not 0 < least <= 1:
            raise ConfigError(
                f"batch_size is {batch_size}, average {average} and least {least}; give at least 2 samples, an average in [0, 1) "
                "and a least factor in (0, 1]."
            )
        for group in optimizer.param_groups:
            _check_group(optimizer, group)
        self.optimizer, self.batch_size, self.average, self.least = optimizer, batch_size, average, least
        self._found: dict[nn.Parameter, dict[str, Any]] = {}
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks = [optimizer.register_step_pre_hook(self._measure), optimizer.register_step_post_hook(self._apply)]

    def remove(self) -> None:
        """Let the optimizer go on without the limit."""
        for hook in self._hooks:
            hook.remove()
        if isinstance(self.optimizer, MomentumOptimizer):
            self.optimizer.rates = {}

    def factors(self) -> dict[Tensor, float]:
        """ρ of every parameter at its last step."""
        states = self.optimizer.state
        return {value: self._corrected(state) for value, state in states.items() if STEPS in state}

    def _corrected(self, state: Mapping[str, Any]) -> float:
        return state[FACTOR] / (1 - self.average ** state[STEPS])

    @torch.no_grad()
    def _measure(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step: ρ of every parameter that has a gradient."""
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise ConfigError(
                "an optimizer that is given a closure computes gradients inside its step, where the limit on relative "
                "representation change does not see them; call backward first, then step() without a closure."
            )
        self._found = {}
        for group in optimizer.param_groups:
            _check_group(optimizer, group)
            present = [value for value in group["params"] if value.grad is not None and not value.grad.is_sparse]
            for parameter, average, square in self._norms(group, present):
                beta, state = average[1], optimizer.state.get(parameter, {})
                steps = state.get(STEPS, 0) + 1
                raw = beta * state.get(SQUARE, 0.0) + (1 - beta) * square
                mean = raw / (1 - beta**steps)
                rho = rate_factor(signal_to_noise(average[0] / mean if mean > 0 else 0.0, beta), self.batch_size)
                rho = min(max(rho, self.least), 1.0)
                factor = self.average * state.get(FACTOR, 0.0) + (1 - self.average) * rho
                self._found[parameter] = {STEPS: steps, SQUARE: raw, FACTOR: factor}
        rates = {parameter: self._corrected(found) for parameter, found in self._found.items()}
        if isinstance(optimizer, MomentumOptimizer):
            optimizer.rates = rates
        else:
            self._before = [(value, value.detach().clone()) for value, rate in rates.items() if rate < 1]

    def _norms(
        self, group: Mapping[str, Any], parameters: list[nn.Parameter]
    ) -> list[tuple[nn.Parameter, tuple[float, float], float]]:
        """For every parameter (‖m̂‖² with this step's gradient, β) and ‖g‖²."""
        products, facts = [], []
        for parameter in parameters:
            assert parameter.grad is not None
            mean, beta, count = self._average(group, parameter)
            grad = parameter.grad.float().flatten()
            mean = torch.zeros_like(grad) if mean is None else mean.flatten()
            products += [torch.dot(mean, mean), torch.dot(mean, grad), torch.dot(grad, grad)]
            facts.append((parameter, beta, 1 - beta**count))
        if not products:
            return []
        found = []
        for (parameter, beta, unbiased), row in zip(facts, torch.stack(products).view(-1, 3).tolist(), strict=True):
            mm, mg, gg = row  # the average with this step's gradient is β m + (1−β) g
            square = beta**2 * mm + 2 * beta * (1 - beta) * mg + (1 - beta) ** 2 * gg
            found.append((parameter, (square / unbiased**2, beta), gg))
        return found

    def _average(self, group: Mapping[str, Any], parameter: nn.Parameter) -> tuple[Tensor | None, float, int]:
        """Average of gradients before this step, its β, and the number of gradients that it holds after it."""
        optimizer = self.optimizer
        state = optimizer.state.get(parameter, {})
        if not isinstance(optimizer, MomentumOptimizer):
            mean, beta = state.get("exp_avg"), group["betas"][0]
        else:
            mean, beta = state.get(optimizer.moments[0]), optimizer.beta_of(group)
            mean = mean * (1 - beta) if optimizer.sums and mean is not None else mean
        return None if mean is None else mean.float(), beta, int(state.get("step", 0)) + 1

    @torch.no_grad()
    def _apply(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: keep the averages, and of a torch optimizer's updates take the share ρ."""
        for parameter, found in self._found.items():
            optimizer.state[parameter].update(found)
        for parameter, before in self._before:
            parameter.copy_(before.lerp_(parameter.detach(), self._corrected(self._found[parameter])))
        self._before = []


def _check_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> None:
    """Raises ConfigError where the stored average is not one of the gradients."""
    if group.get("maximize"):
        raise ConfigError("maximize=True keeps the average of negated gradients; negate the loss instead.")
    if isinstance(optimizer, MomentumOptimizer):
        rests = not all(optimizer.rotates(group, value) for value in group["params"])
        coupled = optimizer.sums and group["weight_decay"] and rests
    else:
        coupled = group["weight_decay"] and not group.get("decoupled_weight_decay", False)
    if coupled:
        raise ConfigError(
            f"the decay of {type(optimizer).__name__} goes through its momentum, so that gradients seem to agree where weights "
            "are large, and the limit on relative representation change would be wrong; give such a group weight_decay 0, or "
            "use an optimizer with decoupled decay (AdamW)."
        )
