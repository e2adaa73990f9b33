"""Far tags against a reading of their rules token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.far_tag import FarTagConfig
from torchstone.recipe.registry import parse_part


@given(
    tags=st.integers(2, 9),
    fillers=st.integers(1, 5),
    every=st.integers(1, 12),
    more=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_rows_follow_the_rules(tags: int, fillers: int, every: int, more: int, seed: int) -> None:
    config = FarTagConfig(tags=tags, fillers=fillers, every=every, length=every + more)
    source = config.build(None)
    batch, distances_t = source.batch(seed, 2, 4), source.distances()
    assert batch.tokens_bt.shape == (4, every + more) == (4, source.length)
    marker = tags + fillers
    assert source.vocab_size == marker + 1
    for row, targets in zip(batch.tokens_bt.tolist(), batch.targets_bt.tolist(), strict=True):
        assert row[0] < tags and targets[0] == IGNORE and distances_t[0] == 0
        for place in range(1, len(row)):
            if place % every == 0:
                assert row[place] == marker and targets[place] == row[0] and distances_t[place] == place
            else:
                assert tags <= row[place] < marker and targets[place] == IGNORE and distances_t[place] == 0


def test_every_tag_and_filler_is_about_as_frequent() -> None:
    source = FarTagConfig(tags=4, fillers=3).build(None)
    tokens_bt = torch.cat([batch.tokens_bt for batch in source.evaluation(256, 2048)])
    shares = torch.bincount(tokens_bt[:, 0], minlength=4) / 2048
    assert float((shares - 0.25).abs().max()) < 0.05
    filler_n = tokens_bt[:, 1:16].flatten() - 4
    assert float((torch.bincount(filler_n, minlength=3) / len(filler_n) - 1 / 3).abs().max()) < 0.02


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = FarTagConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 8) for start in (0, 8)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    for other in (source.batch(5, 8, 16), source.batch(6, 7, 16), next(source.evaluation(16, 16))):
        assert not torch.equal(other.tokens_bt, whole.tokens_bt)


def test_it_is_a_data_source_by_name() -> None:
    part = parse_part("data", "far-tag")
    assert isinstance(part.build(None), DataSource)
    assert part.build(None).fingerprint != FarTagConfig(every=8).build(None).fingerprint


def test_a_sequence_without_markers_is_refused() -> None:
    with pytest.raises(ValidationError, match="choose `every` below `length`"):
        FarTagConfig(every=16, length=16)
