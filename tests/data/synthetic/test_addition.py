"""Additions against a reading of their rules character by character."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.data.batch import IGNORE
from torchstone.data.source import DataSource
from torchstone.data.synthetic.addition import ALPHABET, Addition, AdditionConfig, decode, encode, written
from torchstone.recipe.registry import parse_part
from torchstone.storage.hashing import bytes_hash

COLUMN = re.compile(r"(\d)\+(\d)\+(\d)=(\d),(\d);")


def texts(source: Addition, seed: int = 0, count: int = 16, held_out: bool = False) -> list[str]:
    batch = next(source.evaluation(count, count)) if held_out else source.batch(seed, 0, count)
    tokens = batch.tokens_bt.numpy()
    whole = []
    for row, targets in zip(tokens, batch.targets_bt.numpy(), strict=True):
        scored = np.flatnonzero(targets != IGNORE)
        assert (np.diff(scored) == 1).all() and (row[scored[1:]] == targets[scored[:-1]]).all()
        whole.append(decode(row[: scored[0] + 1]) + decode(targets[scored]))
        assert (row[scored[-1] + 1 :] == 0).all()
    return whole


@given(first=st.integers(100, 999), second=st.integers(100, 999))
def test_both_responses_are_right(first: int, second: int) -> None:
    problem = written(first, second)
    assert problem.prompt == f"{first}+{second}=" and problem.fast == f"{first + second}."
    columns = COLUMN.findall(problem.slow)
    assert COLUMN.sub("", problem.slow) == problem.fast
    carry, digits = 0, ""
    for a, b, c, digit, after in columns:
        assert int(c) == carry and int(a) + int(b) + int(c) == 10 * int(after) + int(digit)
        carry, digits = int(after), digit + digits
    assert "".join(a for a, *_ in columns)[::-1] == str(first) and "".join(x[1] for x in columns)[::-1] == str(second)
    assert int(digits) + carry * 10 ** len(digits) == first + second


@pytest.mark.parametrize("digits", [2, 3, 5])
def test_rows_hold_whole_additions_scored_on_the_response(digits: int) -> None:
    source = AdditionConfig(digits=digits).build(None)
    for text in texts(source) + texts(source, held_out=True):
        first, second, response = re.fullmatch(rf"(\d{{{digits}}})\+(\d{{{digits}}})=(.+\.)", text).groups()  # type: ignore[union-attr]
        problem = written(int(first), int(second))
        assert response in (problem.fast, problem.slow)
    longest = written(10**digits - 1, 10**digits - 1)
    assert source.length == len(longest.prompt + longest.slow) - 1 == source.batch(0, 0, 1).tokens_bt.shape[1]


def test_shares_are_as_asked() -> None:
    for share in (0.0, 0.3, 1.0):
        rows = texts(AdditionConfig(slow=share).build(None), count=1000)
        assert np.mean([";" in row for row in rows]) == pytest.approx(share, abs=0.05)


def test_held_out_problems_are_never_trained_on() -> None:
    """All of a small table: the two sets part the problems."""
    source = AdditionConfig(digits=2, held_out=0.25).build(None)
    prompts = {row.split("=")[0] for row in texts(source, count=20000)}
    kept = {problem.prompt.rstrip("=") for problem in source.problems(2025)}
    assert len(kept) == 2025 and not kept & prompts
    assert len(kept | prompts) > 0.97 * 8100
    assert {row.split("=")[0] for row in texts(source, count=500, held_out=True)} <= kept
    assert [p.prompt for p in source.problems(3, start=4)] == [p.prompt for p in source.problems(7)][4:]


def test_rows_depend_on_seed_step_and_row_alone() -> None:
    source = AdditionConfig().build(None)
    whole = source.batch(5, 7, 16)
    parts = [source.batch(5, 7, 16, start, start + 8) for start in (0, 8)]
    assert torch.equal(torch.cat([part.tokens_bt for part in parts]), whole.tokens_bt)
    assert not torch.equal(source.batch(6, 7, 16).tokens_bt, whole.tokens_bt)


def test_characters_are_tokens() -> None:
    assert decode(encode("12+3=4,5;.")) == "12+3=4,5;." and AdditionConfig().vocabulary() == len(ALPHABET) == 16
    source = parse_part("data", {"kind": "addition", "digits": 2}).build(None)
    assert isinstance(source, DataSource) and source.documents(0, 1, 2)[1][0].id == "addition/seed 0/step 1/row 1"


def test_the_rows_are_the_same_on_every_machine() -> None:
    """Recorded once. If the task changes on purpose, raise `Addition.version` and record again."""
    source = AdditionConfig().build(None)
    batch = source.batch(1, 2, 3)
    assert source.fingerprint == "aeade6ccc14fc89342f6ca8609f4101e"
    assert bytes_hash(batch.tokens_bt.numpy().astype("<i8").tobytes()) == "cd600a6bba1bb193a555f5dc41ae9d34"
