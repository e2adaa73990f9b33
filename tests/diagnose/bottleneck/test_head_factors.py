"""Factors of a head at every rank: those of the truncated decomposition, without one of the matrix's own size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchstone.diagnose.bottleneck.head_factors import HeadFactors
from torchstone.diagnose.bottleneck.head_spectrum import ROWS_AT_ONCE
from torchstone.errors import ConfigError
from torchstone.nn.heads.factored import truncated_factors


def matrix(rows: int, columns: int) -> Tensor:
    """Independent normal numbers with channels of different size."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(0, -2, columns)


@pytest.mark.parametrize("shape", [(50, 12), (12, 50), (12, 12), (ROWS_AT_ONCE + 5, 3), (1, 4)])
def test_products_are_those_of_the_truncated_decomposition(shape: tuple[int, int]) -> None:
    weight_vd = matrix(*shape)
    factors = HeadFactors(weight_vd)
    for rank in {1, (1 + min(shape)) // 2, min(shape)}:
        a_vr, b_rd = factors.of_rank(rank)
        left_vr, right_rd = truncated_factors(weight_vd, rank)
        assert a_vr.shape == (shape[0], rank) and b_rd.shape == (rank, shape[1]) and a_vr.dtype == torch.float32
        torch.testing.assert_close((a_vr @ b_rd).double(), left_vr @ right_rd, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a_vr.double().norm(dim=0), left_vr.norm(dim=0))  # the norm is shared in the same way
        torch.testing.assert_close(b_rd.double().norm(dim=1), right_rd.norm(dim=1))


def test_nothing_of_the_matrixs_own_size_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, sizes = torch.linalg.eigh, []

    def noted(gram: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(gram.shape)
        return eigh(gram)

    monkeypatch.setattr(torch.linalg, "eigh", noted)
    monkeypatch.setattr(torch.linalg, "svd", None)
    factors = HeadFactors(matrix(300, 8))
    factors.of_rank(8), factors.of_rank(2)
    assert sizes == [(8, 8)]
    HeadFactors(matrix(8, 300))
    assert sizes[1:] == [(8, 8)]


def test_missing_directions_get_no_factors() -> None:
    weight_vd = torch.outer(torch.arange(1.0, 9.0), torch.ones(4))
    a_vr, b_rd = HeadFactors(weight_vd).of_rank(3)
    torch.testing.assert_close(a_vr @ b_rd, weight_vd)
    assert a_vr[:, 1:].eq(0).all() and b_rd[1:].eq(0).all()
    a_vr, b_rd = HeadFactors(torch.zeros(5, 3)).of_rank(3)
    assert a_vr.eq(0).all() and b_rd.eq(0).all()


def test_impossible_ranks() -> None:
    with pytest.raises(ConfigError, match=r"rank 4 exceeds min\(vocab 5, width 3\)"):
        HeadFactors(matrix(5, 3)).of_rank(4)
