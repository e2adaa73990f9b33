"""Projections on directions: lengths, cosines, shares of the norm, and random controls."""

from __future__ import annotations

import math

import pytest
import torch

from torchstone.diagnose.landscape.directions import cosine, dot, norm, projections, random_like, unit
from torchstone.errors import ConfigError


def vector(*values: float) -> dict[str, torch.Tensor]:
    """A state of two tensors."""
    return {"a": torch.tensor(values[:2], dtype=torch.float32), "b": torch.tensor([values[2:]], dtype=torch.float32)}


def test_products_norms_and_cosines_run_over_all_tensors() -> None:
    assert dot(vector(1, 2, 3, 4), vector(5, 6, 7, 8)) == 70 and norm(vector(1, 2, 2, 4)) == 5
    assert cosine(vector(1, 0, 1, 0), vector(1, 0, 0, 0)) == pytest.approx(math.sqrt(0.5))
    assert norm(unit(vector(3, 0, 4, 0))) == pytest.approx(1.0)


def test_a_trajectory_is_seen_from_its_origin() -> None:
    origin = vector(1, 1, 1, 1)
    directions = {"progress": vector(2, 0, 0, 0), "decay": vector(0, 0, 3, 0)}
    found = projections([origin, vector(4, 1, 5, 1), vector(1, 3, 1, 1)], origin, directions)
    assert found[0].distance == found[0].share == 0 and found[0].cosine == {"progress": 0.0, "decay": 0.0}
    assert found[1].distance == 5 and found[1].along == pytest.approx({"progress": 3.0, "decay": 4.0})
    assert found[1].cosine == pytest.approx({"progress": 0.6, "decay": 0.8}) and found[1].share == pytest.approx(1.0)
    assert found[2].share == pytest.approx(0.0) and found[2].distance == 2


def test_the_share_counts_oblique_directions_once() -> None:
    directions = {"progress": vector(1, 0, 0, 0), "decay": vector(1, 1, 0, 0)}
    seen = projections([vector(1, 0, 0, 1)], vector(0, 0, 0, 0), directions)[0]
    assert seen.share == pytest.approx(0.5)  # the part in the plane of a, not the sum of squared cosines (0.75)
    assert seen.cosine["progress"] ** 2 + seen.cosine["decay"] ** 2 == pytest.approx(0.75)


def test_random_directions_have_each_tensors_norm_and_come_again_with_their_seed() -> None:
    direction = {"a": torch.randn(50, 50) * 3, "b": torch.randn(200), "still": torch.zeros(4)}
    drawn = random_like(direction, 1)
    for name, value in direction.items():
        assert float(drawn[name].norm()) == pytest.approx(float(value.norm()), rel=1e-5)
    assert abs(cosine(drawn, direction)) < 0.1
    assert all(torch.equal(drawn[name], value) for name, value in random_like(direction, 1).items())
    assert not torch.equal(drawn["a"], random_like(direction, 2)["a"])


def test_directions_that_say_nothing_are_refused() -> None:
    zero = vector(0, 0, 0, 0)
    with pytest.raises(ConfigError, match="length 0 has no cosine"):
        cosine(zero, vector(1, 0, 0, 0))
    with pytest.raises(ConfigError, match="cannot be normalised"):
        projections([zero], zero, {"decay": zero})
    with pytest.raises(ConfigError, match="give at least one direction"):
        projections([zero], zero, {})
    with pytest.raises(ConfigError, match="progress, decay are not independent"):
        projections([zero], zero, {"progress": vector(1, 0, 0, 0), "decay": vector(2, 0, 0, 0)})
