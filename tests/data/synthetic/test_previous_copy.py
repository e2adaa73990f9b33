"""Previous-token copy against a reading of its rule token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.previous_copy import PreviousCopyConfig
from torchstone.data.synthetic.task import score
from torchstone.errors import DataError
from torchstone.recipe.registry import parse_part


@given(symbols=st.integers(2, 30), length=st.integers(2, 40), seed=st.integers(0, 9), step=st.integers(0, 5))
def test_the_target_is_the_token_before(symbols: int, length: int, seed: int, step: int) -> None:
    config = PreviousCopyConfig(symbols=symbols, length=length)
    batch = config.build(None).batch(seed, step, 5)
    assert batch.tokens_bt.shape == (5, config.sequence_length())
    assert int(batch.tokens_bt.min()) >= 0 and int(batch.tokens_bt.max()) < config.vocabulary()
    for row, targets in zip(batch.tokens_bt.tolist(), batch.targets_bt.tolist(), strict=True):
        assert targets == [IGNORE, *row[:-1]]


def test_content_tells_nothing() -> None:
    """Tokens are even and independent: neighbours agree as often as chance says."""
    tokens = PreviousCopyConfig(symbols=8).build(None).batch(0, 0, 2000).tokens_bt
    shares = torch.bincount(tokens.flatten(), minlength=8) / tokens.numel()
    assert float((shares - 1 / 8).abs().max()) < 0.005
    for back in (1, 2, 7):
        assert (tokens[:, back:] == tokens[:, :-back]).double().mean().item() == pytest.approx(1 / 8, abs=0.005)


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = PreviousCopyConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 4) for start in (0, 4, 8, 12)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    for other in (source.batch(5, 8, 16), source.batch(6, 7, 16), next(source.evaluation(16, 16))):
        assert not torch.equal(other.tokens_bt, whole.tokens_bt)


def test_evaluation_at_another_length() -> None:
    source = PreviousCopyConfig(symbols=5, length=8).build(None)
    longer = next(source.evaluation(4, 4, length=50))
    assert longer.tokens_bt.shape == (4, 50) and int(longer.tokens_bt.max()) < 5
    assert torch.equal(longer.targets_bt[:, 1:], longer.tokens_bt[:, :-1])
    assert score(longer.targets_bt, longer) == 1


@pytest.mark.parametrize("length", [1, 0, -3])
def test_lengths_without_a_token_before_are_refused(length: int) -> None:
    with pytest.raises(DataError, match=f"length is {length}, .*at least 2"):
        PreviousCopyConfig().build(None).evaluation(1, 1, length=length)
    assert next(PreviousCopyConfig().build(None).evaluation(3, 3, length=2)).tokens_bt.shape == (3, 2)


def test_the_part_is_found_by_its_kind_and_is_a_source() -> None:
    source = parse_part("data", {"kind": "previous-copy", "symbols": 4}).build(None)
    assert isinstance(source, DataSource) and source.vocab_size == 4 and source.length == 64
