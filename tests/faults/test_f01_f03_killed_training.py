"""F1, F3: `kill -9` at random instants, once, twice in a row, right after a resume; the final weights do not change (P1, P3)."""

from __future__ import annotations

import random
import time

import pytest
from tiny import tiny_recipe

from torchstone.train.checkpoint import CheckpointStore

RECIPE = tiny_recipe(
    budget={"steps": 30}, checkpoint={"every": 3, "keep": 2}, evaluation={"every": 7, "sequences": 8},
    batch={"sequences": 4, "micro": 2}, schedule={"kind": "cosine"},
    model={"kind": "decoder", "width": 32, "depth": 2, "head_dim": 8, "block": {"mixer": {"kind": "attention", "dropout": 0.1}}},
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(zygote, tmp_path_factory, weights):
    """Weights of the run that nothing disturbed, and how long it took."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    assert zygote.run(RECIPE, directory) == 0
    return weights(directory), time.monotonic() - begun


def finish(zygote, directory, kills):
    """Kill after each of the given delays, then let the run finish; every checkpoint on the way must load."""
    killed = 0
    for delay in kills:
        killed += zygote.run(RECIPE, directory, kill_after=delay) == -9
        store = CheckpointStore(directory / "checkpoints")
        if store.steps():
            store.load()
    assert zygote.run(RECIPE, directory) == 0
    return killed


def test_f01_killed_at_a_random_instant(zygote, uninterrupted, weights, trials, fast_path):
    expected, seconds = uninterrupted
    generator = random.Random(1)
    count = trials(20)
    killed = 0
    for trial in range(count):
        directory = fast_path / f"run-{trial}"
        killed += finish(zygote, directory, [generator.uniform(0, seconds)])
        assert weights(directory) == expected, f"trial {trial}"
    assert killed > count // 2, "most kills came too late to mean anything"


def test_f03_killed_twice_and_right_after_a_resume(zygote, uninterrupted, weights, trials, fast_path):
    expected, seconds = uninterrupted
    generator = random.Random(3)
    for trial in range(max(4, trials(20) // 5)):
        directory = fast_path / f"run-{trial}"
        finish(zygote, directory, [generator.uniform(0.2, 0.7) * seconds, generator.uniform(0, 0.3) * seconds, 0.02])
        assert weights(directory) == expected, f"trial {trial}"


def test_evaluation_and_saving_never_advance_training(zygote, uninterrupted, weights, fast_path):
    expected, _ = uninterrupted
    quiet = {**RECIPE, "evaluation": {"every": None, "sequences": 16}, "checkpoint": {"every": None, "keep": 1}}
    assert zygote.run(quiet, fast_path / "run") == 0
    assert weights(fast_path / "run") == expected
