"""Loss along the straight line between two sets of weights.

    θ(α) = (1 − α) · θ_a + α · θ_b,   barrier = max over α in [0, 1] of  loss(θ(α)) − chord(α)
    chord(α) = (1 − α) · loss(θ_a) + α · loss(θ_b)

(Frankle et al. 2020, arXiv 1912.05671, for the barrier; Wen et al. 2024, arXiv 2410.05192, for lines between plateau and
decayed checkpoints.) In the river valley picture, two decayed checkpoints of one run lie along the river: there is no barrier
and the loss falls along the line. Two iterates of the plateau lie on the slopes: the middle of the line is below both ends.

    line = interpolate(earlier, later, line_of_alphas(), loss_fn)          # states, or modules
    line.barrier, line.bulge, line.midpoint

Floating buffers are interpolated like weights, integer buffers are those of θ_a.

Pitfall: the barrier is never negative, because α = 0 and 1 are on the chord; `bulge` looks at the inside alone and has a sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchstone.diagnose.landscape.states import State, blend, holding, require_alike, state_of
from torchstone.errors import ConfigError, DataError

LossFn = Callable[[dict[str, Tensor]], float]


@dataclass(frozen=True)
class LossLine:
    """Losses at ascending α, 0 and 1 among them."""

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    def at(self, alpha: float) -> float:
        """The loss at a measured α."""
        return self.losses[self.alphas.index(alpha)]

    @property
    def above_chord(self) -> tuple[tuple[float, float], ...]:
        """(α, loss − chord) for every measured α in [0, 1]."""
        first, last = self.at(0.0), self.at(1.0)
        return tuple(
            (alpha, loss - ((1 - alpha) * first + alpha * last))
            for alpha, loss in zip(self.alphas, self.losses, strict=True)
            if 0 <= alpha <= 1
        )

    @property
    def barrier(self) -> float:
        """Largest height above the chord over α in [0, 1]; 0 where there is none."""
        return max(0.0, *(height for _, height in self.above_chord))

    @property
    def bulge(self) -> float:
        """Largest height above the chord strictly inside (0, 1); negative where the whole line sags below it."""
        return max(height for alpha, height in self.above_chord if 0 < alpha < 1)

    @property
    def climb(self) -> float:
        """Largest loss strictly inside (0, 1) minus that at α = 0; negative where no measured point lies as high as the start."""
        inside = [loss for alpha, loss in zip(self.alphas, self.losses, strict=True) if 0 < alpha < 1]
        return max(inside) - self.at(0.0)

    @property
    def midpoint(self) -> float:
        """Loss at α = ½ minus the lower of both ends: negative where the middle crosses a valley."""
        return self.at(0.5) - min(self.at(0.0), self.at(1.0))

    @property
    def falls(self) -> bool:
        """Whether the loss falls from each measured α in [0, 1] to the next."""
        inside = [loss for alpha, loss in zip(self.alphas, self.losses, strict=True) if 0 <= alpha <= 1]
        return all(later < earlier for earlier, later in zip(inside, inside[1:], strict=False))


def line_of_alphas(low: float = -0.25, high: float = 1.25, points: int = 13) -> tuple[float, ...]:
    """Evenly spread α; the default is every eighth from −¼ to 1¼.

    Raises:
        ConfigError: fewer than 1 point.
    """
    if points < 1:
        raise ConfigError(f"points was given as {points}; a line is measured at 1 point at least.")
    if points == 1:
        return (low,)
    return tuple(low + (high - low) * i / (points - 1) for i in range(points))


def interpolate(
    theta_a: State | nn.Module, theta_b: State | nn.Module, alphas: Sequence[float], loss_fn: LossFn
) -> LossLine:
    """The loss on the line through two sets of weights.

    Args:
        theta_a, theta_b: state dicts or modules of one architecture.
        alphas: positions; 0, ½ and 1 are added where missing.
        loss_fn: the loss of a state; `loss_of` makes one from a model.

    Raises:
        ConfigError: other names or shapes, or an α that is no finite number. DataError: a loss is not finite.
    """
    if wrong := [alpha for alpha in alphas if not math.isfinite(alpha)]:
        raise ConfigError(f"alphas holds {wrong[0]}; every position on the line is a finite number.")
    a, b = state_of(theta_a), state_of(theta_b)
    require_alike(a, b)
    wanted = tuple(sorted({0.0, 0.5, 1.0, *map(float, alphas)}))
    return LossLine(wanted, tuple(_finite(loss_fn(blend(a, b, alpha)), f"α = {alpha:g}") for alpha in wanted))


def walk(origin: State, direction: State, distances: Sequence[float], loss_fn: LossFn) -> tuple[float, ...]:
    """Losses at origin + distance · direction.

    Raises:
        DataError: a loss is not finite.
    """
    ahead = {name: value + direction[name].to(value) if name in direction else value for name, value in origin.items()}
    return tuple(_finite(loss_fn(blend(origin, ahead, far)), f"distance {far:g}") for far in distances)


def loss_of(model: nn.Module, measure: Callable[[], float]) -> LossFn:
    """A loss of states: `measure` is called while `model` holds the state, whose own weights come back afterwards."""

    def loss(state: dict[str, Tensor]) -> float:
        with holding(model, state):
            return measure()

    return loss


def _finite(loss: float, where: str) -> float:
    if not math.isfinite(loss):
        raise DataError(
            f"the loss at {where} is {loss}; take positions nearer to the checkpoints, or longer rows of text."
        )
    return float(loss)
