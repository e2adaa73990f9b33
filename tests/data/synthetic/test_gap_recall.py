"""Recall over a known gap against a reading of its rules token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.gap_recall import GapRecallConfig
from torchstone.errors import ConfigError
from torchstone.recipe.registry import parse_part


@given(
    keys=st.integers(1, 6),
    values=st.integers(2, 6),
    more=st.integers(1, 20),
    max_gap=st.integers(1, 40),
    filler=st.sampled_from([0.0, 0.25, 0.9]),
    seed=st.integers(0, 9),
)
def test_rows_follow_the_rules(keys: int, values: int, more: int, max_gap: int, filler: float, seed: int) -> None:
    config = GapRecallConfig(
        keys=keys, values=values, fillers=3, cells=keys + more, max_gap=max_gap, filler_probability=filler
    )
    source = config.build(None)
    batch = source.batch(seed, 2, 5)
    assert batch.tokens_bt.shape == (5, config.sequence_length()) == (5, source.length)
    assert config.vocabulary() == source.vocab_size and int(batch.tokens_bt.max()) < source.vocab_size
    gaps_bt, answers_bts = source.gaps(batch.tokens_bt), source.answer_positions(batch.tokens_bt)
    for row, targets, gaps, answers in zip(batch.tokens_bt, batch.targets_bt, gaps_bt, answers_bts, strict=True):
        value_at: dict[int, int] = {}
        for place in range(0, len(row), 2):
            first, second = int(row[place]), int(row[place + 1])
            assert int(targets[place + 1]) == IGNORE and int(gaps[place + 1]) == 0
            assert second >= keys + values or keys <= second < keys + values
            if first < keys and second < keys + values:  # a definition
                assert first not in value_at and int(targets[place]) == IGNORE
                value_at[first] = place + 1
            elif first < keys:  # a question
                answer = value_at[first]
                assert int(targets[place]) == int(row[answer])
                assert int(gaps[place]) == place - answer <= max_gap
                assert answers[place].nonzero().flatten().tolist() == [answer]
                continue
            else:
                assert first >= keys + values and second >= keys + values
            assert int(gaps[place]) == 0 and not answers[place].any()
        assert len(value_at) == keys


def test_gaps_reach_from_the_nearest_to_the_longest() -> None:
    source = GapRecallConfig().build(None)
    gaps = torch.cat([source.gaps(batch.tokens_bt).flatten() for batch in source.evaluation(64, 256)])
    gaps = gaps[gaps > 0]
    assert int(gaps.min()) == 1 and int(gaps.max()) == 99  # odd, and at most max_gap = 100
    assert float((gaps >= 32).double().mean()) > 0.3


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = GapRecallConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 8) for start in (0, 8)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    for other in (source.batch(5, 8, 16), source.batch(6, 7, 16), next(source.evaluation(16, 16))):
        assert not torch.equal(other.tokens_bt, whole.tokens_bt)


def test_it_is_a_data_source_by_name() -> None:
    part = parse_part("data", "gap-recall")
    assert isinstance(part.build(None), DataSource)
    assert part.build(None).fingerprint != GapRecallConfig(max_gap=50).build(None).fingerprint


def test_too_few_cells_are_refused() -> None:
    with pytest.raises((ConfigError, ValidationError), match="more cells or fewer keys"):
        GapRecallConfig(keys=8, cells=8)
