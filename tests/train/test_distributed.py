"""Two gloo processes under torchrun train as one process does: same sequences, same losses, one set of files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe
from torchrun import notes, torchrun

from torchstone.errors import ConfigError
from torchstone.train.distributed import World
from torchstone.train.precision import Compute
from torchstone.train.run import train

RECIPE = tiny_recipe(budget={"steps": 5}, batch={"sequences": 4, "micro": 1}, evaluation={"every": 2, "sequences": 10})
STEPS = range(5)


def rows_by_step(directory, rank):
    found = {}
    for step, *rows in notes(directory, rank)["rows"]:
        found.setdefault(step, []).extend(rows)
    return found


def test_two_ranks_train_as_one_process_does(tmp_path):
    """Also across a resume in the same processes, which keep their group."""
    directory = tmp_path / "pair" / "run"
    directory.parent.mkdir()
    found = torchrun(RECIPE, directory, budgets=[{"steps": 3}, {"steps": 5}])
    assert found.returncode == 0, found.stderr[-3000:]
    alone = train(RECIPE, tmp_path / "alone", compute=Compute("fp32", False), progress=lambda state: None)

    shares = [rows_by_step(directory, rank) for rank in (0, 1)]
    for step in STEPS:
        assert sorted(set(shares[0][step]) | set(shares[1][step])) == [4 * step + row for row in range(4)]
        assert not set(shares[0][step]) & set(shares[1][step])

    losses = [notes(directory, rank)["losses"] for rank in (0, 1)]
    assert losses[0] == losses[1] == pytest.approx(alone.history["train"]["loss"], rel=1e-5)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line["kind"], line["step"]) for line in lines]
    assert len(kinds) == len(set(kinds)), "more than one rank wrote metrics"
    validation = {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}
    expected = dict(zip(alone.history["validation"]["steps"], alone.history["validation"]["loss"], strict=True))
    assert validation.keys() >= expected.keys()
    assert [validation[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)

    pair, single = (
        load_file(folder / "checkpoints" / "step-00000005" / "model.safetensors")
        for folder in (directory, tmp_path / "alone")
    )
    for name, value in single.items():
        torch.testing.assert_close(pair[name], value, rtol=1e-3, atol=1e-5)
    assert json.loads((directory / "run.json").read_text())["environment"]["world"] == 2


def test_a_batch_that_ranks_cannot_share_is_refused():
    world = World(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match="batch.sequences = 4 cannot be shared by 3 processes"):
        world.rows(4)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_shares_are_equal_and_cover_the_batch(size):
    shares = [World(rank, size, torch.device("cpu")).rows(12) for rank in range(size)]
    assert [row for share in shares for row in range(*share)] == list(range(12))
    assert len({stop - start for start, stop in shares}) == 1
