"""Where checkpoints lie: their displacement along named directions, cosines, and shares of the norm.

Two directions matter in the river valley picture (Wen et al. 2024, arXiv 2410.05192):

    decay       decayed − plateau        across the valley: what lowering the learning rate does
    progress    later − earlier          along the river: what training at the peak rate does

    projections(checkpoints, origin, {"decay": difference(decayed, plateau), "progress": difference(later, earlier)})

With δ = θ − origin and directions d_1 … d_k:  cosine_i = ⟨δ, d_i⟩ / (|δ| |d_i|),  along_i = ⟨δ, d_i⟩ / |d_i|,  and the share
of |δ|² that lies in the span of all directions, from the Gram matrix of their pairwise products.

Pitfall: in many dimensions unrelated directions have a cosine near 0, so a small share of the norm can be a large effect.
`random_like` gives the control: independent normal numbers with every tensor's own norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchstone.diagnose.landscape.states import State, difference
from torchstone.errors import ConfigError


@dataclass(frozen=True)
class Projection:
    """One checkpoint seen from the origin.

    Attributes:
        distance: |θ − origin|.
        along: direction → signed length along it.
        cosine: direction → cosine with the displacement; 0 for the origin itself.
        share: part of the squared distance in the span of all directions, 0 … 1; 0 for the origin itself.
    """

    distance: float
    along: Mapping[str, float]
    cosine: Mapping[str, float]
    share: float


def dot(a: State, b: State) -> float:
    """Sum of products over the names that both have, in fp64."""
    shared = a.keys() & b.keys()
    return float(sum(float((a[name].double() * b[name].to(a[name].device).double()).sum()) for name in sorted(shared)))


def norm(direction: State) -> float:
    """Euclidean length over all tensors."""
    return math.sqrt(dot(direction, direction))


def cosine(a: State, b: State) -> float:
    """Cosine of two directions.

    Raises:
        ConfigError: one of them is zero.
    """
    lengths = norm(a) * norm(b)
    if lengths == 0:
        raise ConfigError("a direction of length 0 has no cosine: the two checkpoints that it joins are equal.")
    return dot(a, b) / lengths


def unit(direction: State) -> dict[str, Tensor]:
    """The direction at length 1.

    Raises:
        ConfigError: it is zero.
    """
    length = norm(direction)
    if length == 0:
        raise ConfigError("a direction of length 0 cannot be normalised: the two checkpoints that it joins are equal.")
    return {name: value / length for name, value in direction.items()}


def random_like(direction: State, seed: int) -> dict[str, Tensor]:
    """A random direction in which every tensor has the norm that it has in `direction`; drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in direction.items():
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        length, wanted = float(drawn.norm()), float(value.double().norm())
        found[name] = (drawn * (wanted / length if length else 0.0)).to(value.device, value.dtype)
    return found


def projections(checkpoints: Iterable[State], origin: State, directions: Mapping[str, State]) -> list[Projection]:
    """Every checkpoint's displacement from `origin` along each direction; checkpoints may be made one by one.

    Raises:
        ConfigError: no direction, a zero or repeated direction, or states of other architectures.
    """
    if not directions:
        raise ConfigError("give at least one direction, such as decayed − plateau.")
    units = {name: unit(value) for name, value in directions.items()}
    gram_kk = torch.tensor([[dot(a, b) for b in units.values()] for a in units.values()], dtype=torch.float64)
    if float(torch.linalg.eigvalsh(gram_kk)[0]) < 1e-9:
        raise ConfigError(f"the directions {', '.join(units)} are not independent; leave one of them out.")
    return [_project(difference(state, origin), units, gram_kk) for state in checkpoints]


def _project(displacement: State, units: Mapping[str, State], gram_kk: Tensor) -> Projection:
    distance = norm(displacement)
    along = {name: dot(displacement, value) for name, value in units.items()}
    if distance == 0:
        return Projection(0.0, along, dict.fromkeys(units, 0.0), 0.0)
    along_k = torch.tensor(list(along.values()), dtype=torch.float64)
    inside = float(along_k @ torch.linalg.solve(gram_kk, along_k))
    share = min(1.0, max(0.0, inside / distance**2))
    return Projection(distance, along, {name: length / distance for name, length in along.items()}, share)
