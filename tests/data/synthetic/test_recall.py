"""Recall against a reading of its rules token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.source import DataSource
from torchstone.data.synthetic.recall import RecallConfig, answer_positions, score
from torchstone.errors import DataError
from torchstone.recipe.registry import parse_part
from torchstone.storage.hashing import bytes_hash


def slow_targets(tokens: list[int], keys: int) -> list[int]:
    """Targets of one row by the words of the rule."""
    seen: set[int] = set()
    targets = []
    for place, token in enumerate(tokens):
        repeated = place % 2 == 0 and token < keys and token in seen
        targets.append(tokens[place + 1] if repeated else IGNORE)
        if token < keys:
            seen.add(token)
    return targets


def slow_answers(tokens: list[int], keys: int) -> torch.Tensor:
    size = len(tokens)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for earlier in range(query):
            if tokens[query] < keys and tokens[earlier] == tokens[query]:
                mask[query, earlier + 1] = True
    return mask


@given(
    keys=st.integers(1, 9),
    values=st.integers(1, 9),
    cells=st.integers(2, 20),
    filler=st.sampled_from([0.0, 0.25, 0.9]),
    fillers=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_rows_follow_the_rules(keys: int, values: int, cells: int, filler: float, fillers: int, seed: int) -> None:
    config = RecallConfig(keys=keys, values=values, cells=cells, filler_probability=filler, fillers=fillers)
    source = config.build(None)
    batch = source.batch(seed, 3, 6)
    assert batch.tokens_bt.shape == (6, config.sequence_length()) == (6, source.length)
    assert config.vocabulary() == source.vocab_size and int(batch.tokens_bt.max()) < source.vocab_size
    masks = source.answer_positions(batch.tokens_bt)
    for row, targets, mask in zip(batch.tokens_bt.tolist(), batch.targets_bt.tolist(), masks, strict=True):
        value_of: dict[int, int] = {}
        for first, second in zip(row[0::2], row[1::2], strict=True):
            if first < keys:
                assert keys <= second < keys + values
                assert value_of.setdefault(first, second) == second
            else:
                assert first >= keys + values and second >= keys + values
        assert targets == slow_targets(row, keys)
        assert torch.equal(mask, slow_answers(row, keys))


def test_every_answer_that_is_marked_is_the_target() -> None:
    source = RecallConfig().build(None)
    batch = source.batch(0, 0, 64)
    mask_bts = answer_positions(batch.tokens_bt, 8)
    assert torch.equal(mask_bts.any(-1), batch.targets_bt != IGNORE)
    rows, queries, places = mask_bts.nonzero(as_tuple=True)
    assert torch.equal(batch.tokens_bt[rows, places], batch.targets_bt[rows, queries])


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = RecallConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 4) for start in (12, 0, 8, 4)]
    parts.sort(key=lambda part: part.rows)
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    assert torch.equal(torch.cat([part.targets_bt for part in parts]), whole.targets_bt)
    assert sum((part.rows for part in parts), ()) == whole.rows == tuple(range(112, 128))
    for other in (source.batch(5, 8, 16), source.batch(6, 7, 16), next(source.evaluation(16, 16))):
        assert not torch.equal(other.tokens_bt, whole.tokens_bt)


def test_the_share_of_filler_and_the_map_are_as_asked() -> None:
    source = RecallConfig(cells=64).build(None)
    tokens = source.batch(0, 0, 2000).tokens_bt
    assert (tokens[:, 0::2] >= 16).double().mean().item() == pytest.approx(0.25, abs=0.005)
    maps = {tuple(row[1::2][(row[0::2] == 3)][:1].tolist()) for row in tokens}
    assert len(maps - {()}) == 8  # key 3 has every value in some sequence


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_stress_multiplies_filler_per_pair(factor: int) -> None:
    source = RecallConfig(stress=factor).build(None)
    tokens = next(source.evaluation(4000, 4000)).tokens_bt
    filler = (tokens[:, 0::2] >= 16).double().mean().item()
    assert filler / (1 - filler) == pytest.approx(factor / 3, rel=0.03)
    given = next(RecallConfig().build(None).evaluation(4000, 4000, filler_factor=factor)).tokens_bt
    assert torch.equal(given, tokens)
    assert tokens.shape[1] == source.length


def test_stress_leaves_training_as_it_is() -> None:
    plain, stressed = RecallConfig().build(None), RecallConfig(stress=4).build(None)
    assert torch.equal(plain.batch(0, 0, 8).tokens_bt, stressed.batch(0, 0, 8).tokens_bt)
    assert plain.fingerprint != stressed.fingerprint
    with pytest.raises(DataError, match="filler_factor is -1"):
        next(plain.evaluation(1, 1, filler_factor=-1))


def test_score_counts_scored_positions_only() -> None:
    targets = torch.tensor([[IGNORE, 2, 3], [1, IGNORE, IGNORE]])
    batch = Batch(torch.zeros_like(targets), targets)
    predicted = torch.tensor([[0, 2, 0], [1, 5, 5]])
    assert score(predicted, batch) == pytest.approx(2 / 3)
    assert score(torch.nn.functional.one_hot(predicted, 6).float(), batch) == pytest.approx(2 / 3)
    assert math.isnan(score(predicted, Batch(targets, torch.full_like(targets, IGNORE))))


def test_the_part_is_found_by_its_kind_and_is_a_source() -> None:
    config = parse_part("data", {"kind": "recall", "keys": 4})
    assert isinstance(config.build(None), DataSource)
    spans = config.build(None).documents(0, 1, 2)
    assert [len(row) for row in spans] == [1, 1] and spans[1][0].id == "recall/seed 0/step 1/row 1"


def test_the_rows_are_the_same_on_every_machine() -> None:
    """Recorded once. If the task changes on purpose, raise `Recall.version` and record again."""
    source = RecallConfig().build(None)
    batch = source.batch(1, 2, 3)
    assert source.fingerprint == "0b60bd23ff2265591281984d2c0cd3c0"
    assert bytes_hash(batch.tokens_bt.numpy().astype("<i8").tobytes()) == "3fded4d784119f37d7f729d0c1f3452c"
