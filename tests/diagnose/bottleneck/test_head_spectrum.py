"""Head spectra: definitions, the Gram matrix of tall heads, controls, and bad matrices."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from tests.support.subjects import byte_subject

from torchstone.diagnose.bottleneck.head_spectrum import (
    MANY,
    head_spectrum_finding,
    random_spectrum,
    singular_values,
    spectrum,
)
from torchstone.errors import ConfigError, DataError


def test_flat_and_spiky() -> None:
    flat = spectrum(torch.eye(6)[:, :4])
    assert flat.entropy == pytest.approx(math.log(4)) and flat.kl_uniform == pytest.approx(0, abs=1e-12)
    assert flat.effective_rank == pytest.approx(4) and flat.stable_rank == pytest.approx(4)
    assert flat.top_share == pytest.approx(0.25)
    spike = spectrum(torch.outer(torch.arange(1.0, 7.0), torch.ones(4)))
    assert spike.effective_rank == pytest.approx(1, abs=1e-4) and spike.stable_rank == pytest.approx(1)
    assert spike.kl_uniform == pytest.approx(math.log(4), abs=1e-4) and spike.top_share == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(50, 10), (10, 50), (1, 5), (5, 1)])
def test_values_are_those_of_the_matrix_either_way_up(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(singular_values(weight), torch.linalg.svdvals(weight.double()))
    assert spectrum(weight).entropy == pytest.approx(spectrum(1e6 * weight.T).entropy)


def test_tall_matrices_go_through_the_gram_matrix() -> None:
    weight = torch.randn(4 * MANY + 3, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -5, 12)
    exact = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(singular_values(weight), exact, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        singular_values(weight.half().T), torch.linalg.svdvals(weight.half().double()), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(5, 3), "zero"),
        (torch.zeros(0, 3), "entries"),
        (torch.ones(4), "entries"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [1.0, 1.0]]), "row 1"),
    ],
)
def test_bad_matrices(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        spectrum(weight)


def test_a_random_square_matrix_uses_most_directions() -> None:
    assert 0.7 * 64 < random_spectrum(64, 64).effective_rank < 64
    assert random_spectrum(64, 64, seed=1).entropy != random_spectrum(64, 64).entropy


def test_finding_says_whether_the_head_is_tied() -> None:
    tied = head_spectrum_finding(byte_subject())
    assert "tied to the token embedding" in tied.answer and tied.tables[1].rows[0][0] == 1
    own = head_spectrum_finding(byte_subject(head={"kind": "linear", "tied": False}))
    assert "not tied" in own.answer
    assert {row[0] for row in own.tables[0].rows} >= {"effective rank", "KL to uniform (nats)"}


def test_texts_are_not_asked_for() -> None:
    """The command line takes from this signature what an analysis needs."""
    assert list(inspect.signature(head_spectrum_finding).parameters) == ["subject", "seed"]


def test_a_factored_head_shows_its_rank() -> None:
    found = head_spectrum_finding(byte_subject(head={"kind": "factored", "rank": 3}))
    values = [row[1] for row in found.tables[1].rows]
    assert values[2] > 1e-3 and values[3] < 1e-5 * values[0]


def test_a_mixture_has_no_matrix() -> None:
    with pytest.raises(ConfigError, match="mixture-of-softmaxes"):
        head_spectrum_finding(byte_subject(head={"kind": "mixture-of-softmaxes", "components": 2}))
