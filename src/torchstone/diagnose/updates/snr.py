"""Signal and noise of gradients: how much of a batch's gradient its samples have in common.

    Φ = ‖ḡ‖² / (σ²/B)      of the batch's gradient: ḡ its expectation, σ² the variance of one sample's, B samples
    φ = Φ / B              of one sample
    1/φ = B / Φ            critical batch size: below it a larger batch has a better gradient, above it hardly

From moments. m is the average of the last gradients with weights that fall by β (bias-corrected), Q that of ‖g‖² with
the same weights. Where ḡ changes slowly against 1/(1 − β) updates, E‖m‖² = ‖ḡ‖² + κ σ²/B and E Q = ‖ḡ‖² + σ²/B, so
that

    Φ = (r − κ)/(1 − r),   r = ‖m‖²/Q,   κ = (1 − β)/(1 + β) · (1 + β^t)/(1 − β^t)      after t gradients

κ falls from 1 at the first gradient, where nothing can be said, to (1 − β)/(1 + β). Signal below zero counts as zero.

From two halves of one batch, without that assumption: g₁ and g₂ share only ḡ, so ⟨g₁, g₂⟩ estimates ‖ḡ‖² and ‖g₁ −
g₂‖²/4 estimates σ²/B (`snr_of_halves`).

m is the optimizer's own where it keeps such an average (Adam and its kin without coupled decay, SGD with momentum and
without coupled decay or dampening, this package's sign and rotational optimizers), else one kept here. Q is always
kept here: one norm per matrix and step.

Pitfalls: gradients are those that the optimizer sees, after clipping, which moves Φ where its factor changes from
step to step. A ḡ that turns within 1/(1 − β) updates looks like noise, and where successive gradients point against each other,
as they do at high rates, the average is smaller than noise alone would make it: Φ from moments is then too low, early and
late, and often cut off at 0. `snr_of_halves` on fresh batches has no such bias. A gradient that is not finite is left out.
Averages kept here start anew on resume, and are off for about 1/(1 − β) updates where m is the optimizer's and older
than Q."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchstone.errors import ConfigError
from torchstone.optim.momentum import MomentumOptimizer

BETA = 0.9
ADAMS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)  # AdamW is an Adam


@dataclass(frozen=True)
class Noise:
    """Of one matrix or of several together: estimates of ‖ḡ‖² and σ²/B, and of ⟨g, m⟩, ‖g‖² and ‖m‖² before the update."""

    signal: float = 0.0
    noise: float = 0.0
    crossed: float = 0.0
    gradient: float = 0.0
    momentum: float = 0.0

    def __add__(self, other: Noise) -> Noise:
        return Noise(
            self.signal + other.signal,
            self.noise + other.noise,
            self.crossed + other.crossed,
            self.gradient + other.gradient,
            self.momentum + other.momentum,
        )

    @property
    def snr(self) -> float | None:
        """Φ, at least 0; None where the moments do not tell (the first gradient, no noise at all)."""
        return max(0.0, self.signal) / self.noise if self.noise > 0 else None

    @property
    def alignment(self) -> float | None:
        """cos(g, m) with m before this gradient joined it; None where one of them is zero."""
        length = (self.gradient * self.momentum) ** 0.5
        return self.crossed / length if length > 0 else None


def snr_of_halves(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Φ of a whole batch from the mean gradients of its two halves.

    Args:
        first, second: gradients of the same parameters, each the mean over one half.

    Returns:
        The estimate, clipped to be at least 0; its error is large for a single batch where Φ is far below 1.

    Raises:
        ConfigError: the halves have other parameters, or equal gradients (no noise to compare with).
    """
    if len(first) != len(second) or not first:
        raise ConfigError(
            f"two halves of a batch have gradients of the same parameters; given {len(first)} and {len(second)}."
        )
    shared = sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True))
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(first, second, strict=True)) / 4
    if noise == 0:
        raise ConfigError(
            "the two halves have equal gradients, so there is no noise; give halves of different samples."
        )
    return max(0.0, shared / noise)


class GradientMoments:
    """Averages of the gradients of some parameters, as of every step.

    Args:
        parameters: by name.
        optimizer: what updates them.
        beta: None takes the optimizer's own average where it keeps one, else β = 0.9; a number keeps one here for every
            parameter, which makes optimizers comparable.
        step: updates that the optimizer has made already.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        beta: float | None = None,
        step: int = 0,
    ) -> None:
        self.parameters, self.optimizer, self.step, self.seen = parameters, optimizer, step, 0
        groups = {id(value): group for group in optimizer.param_groups for value in group["params"]}
        self.groups = {name: groups[id(value)] for name, value in parameters.items()}
        decays = {
            name: None if beta is not None else optimizer_beta(optimizer, self.groups[name]) for name in parameters
        }
        self.own = {name: decay is None for name, decay in decays.items()}
        fallback = BETA if beta is None else beta
        self.betas = {name: fallback if decay is None else decay for name, decay in decays.items()}
        self._averages: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(parameters, 0)
        self._aligned: dict[str, tuple[float, float, float]] = {}

    @torch.no_grad()
    def observe(self, measured: bool) -> None:
        """Take in the gradients before an update; on a measured one compare them with the momentum first.

        Raises:
            ConfigError: a sparse gradient.
        """
        present = {name: value.grad for name, value in self.parameters.items() if value.grad is not None}
        sparse = [name for name, gradient in present.items() if gradient.is_sparse]
        if sparse:
            raise ConfigError(
                f"{sparse[0]} has a sparse gradient, whose moments are not kept; leave out the metric snr."
            )
        if not present:
            return
        names = list(present)
        norms = torch._foreach_norm(list(present.values()), dtype=torch.float32)
        if measured:
            self._aligned = {
                name: _aligned(present[name], norm, self._momentum(name))
                for name, norm in zip(names, norms, strict=True)
            }
        finite = {name: norm for name, norm in zip(names, norms, strict=True) if bool(norm.isfinite())}
        self._keep({name: present[name] for name in finite}, finite)
        self.step += 1

    def _keep(self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        own = [name for name in gradients if self.own[name]]
        for name in own:
            if name not in self._averages:
                self._averages[name] = torch.zeros_like(gradients[name], dtype=torch.float32)
            self._averages[name].lerp_(gradients[name].float(), 1 - self.betas[name])
        for name, norm in norms.items():
            before = self._squares.get(name, torch.zeros_like(norm))
            self._squares[name] = torch.lerp(before, norm.square(), 1 - self.betas[name])
            self._counts[name] += 1

    def _momentum(self, name: str) -> tuple[Tensor, float] | None:
        """The average as it is stored and what it is to be divided by; None before the first gradient."""
        beta = self.betas[name]
        if self.own[name]:
            return (self._averages[name], 1 - beta ** self._counts[name]) if name in self._averages else None
        state = self.optimizer.state.get(self.parameters[name], {})
        if not state:
            return None
        stored, factor = _stored_average(self.optimizer, state, beta)
        return stored, (1 - beta ** self._gradients_in(state)) / factor

    def _gradients_in(self, state: Mapping[str, Any]) -> int:
        stored = state.get("step")
        return self.step if stored is None else int(stored)

    def noises(self) -> dict[str, Noise]:
        """Estimates after the update, by name; parameters without a gradient are left out."""
        found = {}
        for name, count in self._counts.items():
            momentum = self._momentum(name)
            if momentum is None or not count:
                continue
            stored, share = momentum
            beta = self.betas[name]
            steps = count if self.own[name] else self._gradients_in(self.optimizer.state[self.parameters[name]])
            square = float(torch.linalg.vector_norm(stored, dtype=torch.float32)) ** 2 / share**2
            mean = float(self._squares[name]) / (1 - beta**count)
            kappa = (1 - beta) / (1 + beta) * (1 + beta**steps) / (1 - beta**steps)
            known = steps > 1 and kappa < 1
            signal, noise = (
                ((square - kappa * mean) / (1 - kappa), (mean - square) / (1 - kappa)) if known else (0.0, 0.0)
            )
            found[name] = Noise(signal, noise, *self._aligned.get(name, (0.0, 0.0, 0.0)))
        return found


def optimizer_beta(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | None:
    """β of the gradient average that an optimizer keeps for a group, or None if it keeps none that is known here."""
    if isinstance(optimizer, MomentumOptimizer):
        coupled = optimizer.sums and group["weight_decay"]
        return None if coupled else optimizer.beta_of(group) or None
    if group.get("maximize"):
        return None
    coupled = bool(group.get("weight_decay")) and not group.get("decoupled_weight_decay", False)
    if isinstance(optimizer, ADAMS):
        return None if coupled else float(group["betas"][0])
    if isinstance(optimizer, torch.optim.SGD) and not group["dampening"] and not coupled:
        return float(group["momentum"]) or None
    return None


def _stored_average(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], beta: float) -> tuple[Tensor, float]:
    """The tensor that holds the average, and what it is to be multiplied by; a momentum buffer sums where it weighs by 1 - β."""
    if isinstance(optimizer, MomentumOptimizer):
        return state[optimizer.moments[0]], 1 - beta if optimizer.sums else 1.0
    return (state["exp_avg"], 1.0) if "exp_avg" in state else (state["momentum_buffer"], 1 - beta)


def _aligned(gradient: Tensor, norm: Tensor, momentum: tuple[Tensor, float] | None) -> tuple[float, float, float]:
    """⟨g, m⟩, ‖g‖², ‖m‖² of a matrix; zeros before the first gradient."""
    square = float(norm) ** 2
    if momentum is None:
        return 0.0, square, 0.0
    stored, share = momentum
    crossed = float((gradient.float() * stored.float()).sum()) / share
    return crossed, square, (float(torch.linalg.vector_norm(stored, dtype=torch.float32)) / share) ** 2
