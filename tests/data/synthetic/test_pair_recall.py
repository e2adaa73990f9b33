"""Pair recall against a reading of its rules token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.pair_recall import PairRecallConfig
from torchstone.data.synthetic.task import score
from torchstone.recipe.registry import parse_part


@given(pairs=st.integers(1, 8), more=st.integers(0, 5), values=st.integers(2, 6), seed=st.integers(0, 9))
def test_rows_follow_the_rules(pairs: int, more: int, values: int, seed: int) -> None:
    config = PairRecallConfig(pairs=pairs, keys=pairs + more, values=values)
    source = config.build(None)
    batch = source.batch(seed, 2, 5)
    assert batch.tokens_bt.shape == (5, config.sequence_length()) == (5, source.length)
    first_query = config.keys * values
    first_value = first_query + config.keys
    assert config.vocabulary() == source.vocab_size == first_value + values
    for row, targets in zip(batch.tokens_bt.tolist(), batch.targets_bt.tolist(), strict=True):
        known = {}
        for token, target in zip(row[:pairs], targets[:pairs], strict=True):
            assert 0 <= token < first_query and target == IGNORE
            known[token // values] = token % values
        assert len(known) == pairs
        for token, target in zip(row[pairs:], targets[pairs:], strict=True):
            assert target == first_value + known.pop(token - first_query)
        assert not known


def test_values_keys_and_order_are_even_and_independent() -> None:
    source = PairRecallConfig(pairs=4, keys=8, values=4).build(None)
    batch = next(source.evaluation(6000, 6000))
    pairs_bp, queries_bp = batch.tokens_bt[:, :4], batch.tokens_bt[:, 4:] - 32
    keys_bp, values_bp = pairs_bp // 4, pairs_bp % 4
    for place in range(4):
        for key in range(8):
            assert (keys_bp[:, place] == key).double().mean().item() == pytest.approx(1 / 8, abs=0.02)
        for value in range(4):
            at_key = values_bp[keys_bp[:, place] == 3, place]
            assert (at_key == value).double().mean().item() == pytest.approx(1 / 4, abs=0.06)
        for asked in range(4):  # which pair a query asks for
            share = (queries_bp[:, place] == keys_bp[:, asked]).double().mean().item()
            assert share == pytest.approx(1 / 4, abs=0.03)
    assert score(batch.targets_bt, batch) == 1


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = PairRecallConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 4) for start in (0, 4, 8, 12)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    for other in (source.batch(5, 8, 16), source.batch(6, 7, 16), next(source.evaluation(16, 16))):
        assert not torch.equal(other.tokens_bt, whole.tokens_bt)


def test_more_pairs_than_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="more keys or fewer pairs"):
        PairRecallConfig(pairs=9, keys=8)


def test_the_part_is_found_by_its_kind_and_is_a_source() -> None:
    source = parse_part("data", {"kind": "pair-recall", "pairs": 2, "keys": 3, "values": 5}).build(None)
    assert isinstance(source, DataSource) and source.vocab_size == 15 + 3 + 5
    assert source.fingerprint != PairRecallConfig(pairs=3, keys=3, values=5).build(None).fingerprint
