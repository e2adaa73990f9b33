"""Key match against a reading of its rules token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.key_match import KeyMatchConfig
from torchstone.data.synthetic.task import score
from torchstone.errors import DataError
from torchstone.recipe.registry import parse_part

SETTINGS = {
    "keys": st.integers(1, 6),
    "values": st.integers(2, 6),
    "fillers": st.integers(1, 4),
    "body": st.integers(0, 30),
    "seed": st.integers(0, 9),
}


@given(**SETTINGS)
def test_rows_follow_the_rules(keys: int, values: int, fillers: int, body: int, seed: int) -> None:
    config = KeyMatchConfig(keys=keys, values=values, fillers=fillers, length=2 * keys + body)
    source = config.build(None)
    batch = source.batch(seed, 2, 4)
    assert batch.tokens_bt.shape == (4, config.sequence_length())
    first_question, first_filler = keys * values, keys * values + keys
    first_value = first_filler + fillers
    assert config.vocabulary() == source.vocab_size == first_value + values
    distances = source.distances(batch.tokens_bt).tolist()
    for row, targets, gaps in zip(batch.tokens_bt.tolist(), batch.targets_bt.tolist(), distances, strict=True):
        carriers = {
            token // values: (place, token % values) for place, token in enumerate(row) if token < first_question
        }
        assert sorted(carriers) == list(range(keys)) and sum(token < first_question for token in row) == keys
        asked = row[-keys:]
        assert sorted(asked) == list(range(first_question, first_filler))
        assert all(first_filler <= token < first_value for token in row[:-keys] if token >= first_question)
        for place, (token, target, gap) in enumerate(zip(row, targets, gaps, strict=True)):
            if place < len(row) - keys:
                assert target == IGNORE and gap == 0
            else:
                carrier, value = carriers[token - first_question]
                assert target == first_value + value and gap == place - carrier >= 1


def test_distances_cover_the_length_evenly_and_tell_nothing_of_the_value() -> None:
    source = KeyMatchConfig(keys=4, values=4, length=64).build(None)
    batch = next(source.evaluation(4000, 4000))
    gaps = source.distances(batch.tokens_bt)[:, -4:].double().flatten()
    values = batch.targets_bt[:, -4:].flatten() - int(batch.targets_bt.max()) + 3
    assert gaps.min() == 1 and gaps.max() == 63
    assert gaps.mean().item() == pytest.approx(32, abs=0.6)
    for value in range(4):
        assert gaps[values == value].mean().item() == pytest.approx(32, abs=1.2)
        assert (values == value).double().mean().item() == pytest.approx(1 / 4, abs=0.02)


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_longer_rows_ask_over_longer_distances(factor: int) -> None:
    source = KeyMatchConfig(length=64).build(None)
    batch = next(source.evaluation(600, 600, length=factor * 64))
    gaps = source.distances(batch.tokens_bt)
    assert batch.tokens_bt.shape[1] == factor * 64 and int(gaps.max()) < factor * 64
    assert gaps[:, -4:].double().mean().item() == pytest.approx(factor * 32, rel=0.1)
    assert score(batch.targets_bt, batch) == 1


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = KeyMatchConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 4) for start in (0, 4, 8, 12)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    for other in (source.batch(5, 8, 16), source.batch(6, 7, 16), next(source.evaluation(16, 16))):
        assert not torch.equal(other.tokens_bt, whole.tokens_bt)


def test_lengths_without_room_are_refused() -> None:
    with pytest.raises(ValidationError, match="at least 8"):
        KeyMatchConfig(keys=4, length=7)
    with pytest.raises(DataError, match="at least 8"):
        next(KeyMatchConfig(keys=4).build(None).evaluation(1, 1, length=7))


def test_the_part_is_found_by_its_kind_and_is_a_source() -> None:
    source = parse_part("data", {"kind": "key-match", "keys": 2, "values": 3, "fillers": 1}).build(None)
    assert isinstance(source, DataSource) and source.vocab_size == 6 + 2 + 1 + 3
