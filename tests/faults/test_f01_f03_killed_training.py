"""F1, F3: `kill -9` at random instants, once, twice in a row, right after a resume; the final weights do not change (P1, P3)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
from tiny import tiny_recipe

from torchstone.train.checkpoint import CheckpointStore

RECIPE = tiny_recipe(
    budget={"steps": 30}, checkpoint={"every": 3, "keep": 2}, evaluation={"every": 7, "sequences": 8},
    batch={"sequences": 4, "micro": 2}, schedule={"kind": "cosine"},
    model={"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, "block": {"mixer": {"kind": "attention", "dropout": 0.1}}},
)  # fmt: skip


RECORDS = 30 + 5  # of training steps and evaluations


@pytest.fixture(scope="module")
def uninterrupted(zygote, memory_path, weights):
    """Weights of the run that nothing disturbed, and seconds between two of its records."""
    begun = time.monotonic()
    assert zygote.run(RECIPE, memory_path / "whole") == 0
    return weights(memory_path / "whole"), (time.monotonic() - begun) / RECORDS


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(zygote, directory, records, delay):
    """Start the run, and kill it some time after it has written some records; True if it was still running."""
    metrics = directory / "metrics.jsonl"
    enough = lines(metrics) + records
    pid = zygote.start(RECIPE, directory)
    try:
        while lines(metrics) < enough:
            os.kill(pid, 0)
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return zygote.wait() == -signal.SIGKILL


def finish(zygote, directory, kills):
    """Kill once for each (records, delay), then let the run finish; every checkpoint on the way must load."""
    killed = 0
    for records, delay in kills:
        killed += kill(zygote, directory, records, delay)
        store = CheckpointStore(directory / "checkpoints")
        if store.steps():
            store.load()
    assert zygote.run(RECIPE, directory) == 0
    return killed


def test_f01_killed_at_a_random_instant(zygote, uninterrupted, weights, trials, memory_path):
    expected, pace = uninterrupted
    generator = random.Random(1)
    count = trials(20)
    killed = 0
    for trial in range(count):
        directory = memory_path / f"once-{trial}"
        killed += finish(zygote, directory, [(generator.randrange(RECORDS), generator.uniform(0, pace))])
        assert weights(directory) == expected, f"trial {trial}"
        shutil.rmtree(directory)
    assert killed > count // 2, "most kills came too late to mean anything"


def test_f03_killed_twice_and_right_after_a_resume(zygote, uninterrupted, weights, trials, memory_path):
    expected, pace = uninterrupted
    generator = random.Random(3)
    for trial in range(max(4, trials(20) // 5)):
        directory = memory_path / f"thrice-{trial}"
        middle, soon, at_once = generator.randrange(8, 24), generator.randrange(8), 0
        finish(zygote, directory, [(records, generator.uniform(0, pace)) for records in (middle, soon, at_once)])
        assert weights(directory) == expected, f"trial {trial}"
        shutil.rmtree(directory)


def test_evaluation_and_saving_never_advance_training(zygote, uninterrupted, weights, memory_path):
    expected, _ = uninterrupted
    quiet = {**RECIPE, "evaluation": {"every": None, "sequences": 16}, "checkpoint": {"every": None, "keep": 1}}
    assert zygote.run(quiet, memory_path / "quiet") == 0
    assert weights(memory_path / "quiet") == expected
