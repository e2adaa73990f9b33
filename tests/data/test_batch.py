"""Splitting and moving a batch keeps every array and row number."""

from __future__ import annotations

import pytest
import torch

from torchstone.data.batch import TENSORS, Batch


def batch_of(size: int) -> Batch:
    tokens = torch.arange(size * 3).view(size, 3)
    rows = tuple(range(10, 10 + size))
    return Batch(tokens, tokens + 1, tokens % 3, tokens * 0, rows, tokens / 7, tokens % 2 == 0, tokens / 3)


@pytest.mark.parametrize(("micro", "sizes"), [(None, [5]), (9, [5]), (5, [5]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_pieces_join_to_the_whole(micro: int | None, sizes: list[int]) -> None:
    whole = batch_of(5)
    pieces = whole.split(micro)
    assert [len(piece.rows) for piece in pieces] == sizes
    assert len(TENSORS) == 7
    for name in TENSORS:
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name))
    assert sum((piece.rows for piece in pieces), ()) == whole.rows
    assert sum(piece.tokens for piece in pieces) == whole.tokens == 15


def test_absent_arrays_stay_absent() -> None:
    tokens = torch.zeros(4, 2, dtype=torch.int64)
    for piece in [*Batch(tokens, tokens).split(3), Batch(tokens, tokens).to("meta")]:
        assert [name for name in TENSORS if getattr(piece, name) is not None] == ["tokens_bt", "targets_bt"]
    assert batch_of(2).to("meta").positions_bt.device.type == "meta"
