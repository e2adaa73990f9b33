"""Training on pairs of prefix and suffix where some rows of a batch have none: exact resume, and means over the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from torchstone.errors import DataError, InterruptedRun
from torchstone.recipe.load import load_recipe
from torchstone.train.run import RunSummary, load_run, train
from torchstone.train.signals import Stop

STEPS, ROWS, LENGTH = 6, 6, 12
Make = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.filterwarnings("ignore:.*sequences of a batch have no pair:UserWarning")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Plain data of a run on stretches of documents too short for a pair, and of longer ones: recipe(pair_rate=0.5, …)."""
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.jsonl"
    texts = [f"{n % 10}{'abcdefgh' if n // 20 % 5 == 4 else ''}" for n in range(2000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(micro: int | None = None, **objective: Any) -> dict[str, Any]:
        return tiny_recipe(
            model={"kind": "belief-state", "width": 16, "depth": 1, "head_dim": 8, "end_token": 256},
            data={
                "kind": "text",
                "corpus": {"kind": "files", "paths": str(path)},
                "tokenizer": "bytes",
                "length": LENGTH,
            },
            objective={"kind": "belief-state", "gap_min": 6, **objective},
            batch={"sequences": ROWS, "micro": micro},
            budget={"steps": STEPS},
        )

    return make


def run(given: dict[str, Any], directory: Path, **options: Any) -> RunSummary:
    return train(given, directory, **{"progress": lambda state: None, **options})


def test_some_rows_have_no_pair_and_some_micro_batches_none_at_all(recipe: Make) -> None:
    """What the tests below rest on."""
    given = load_recipe(recipe())
    data, objective = given.data.build(None), given.objective.build()
    model = given.model.build(data.vocab_size, data.length, 0)
    counts = [
        [objective.count_targets(data.batch(0, step, ROWS, row, row + 1), model) for row in range(ROWS)]
        for step in range(STEPS)
    ]
    assert all(0 < sum(rows) < ROWS for rows in counts)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resumed_run_ends_bitwise_as_a_straight_one(recipe: Make, tmp_path: Path, at: int) -> None:
    given = recipe(micro=2, pair_rate=0.5)
    straight = run(given, tmp_path / "straight")
    stop = Stop()
    with pytest.raises(InterruptedRun, match=f"after step {at} of {STEPS}"):
        run(
            given,
            tmp_path / "run",
            stop=stop,
            progress=lambda state: stop.ask("the test") if state["step"] == at else None,
        )
    resumed = run(given, tmp_path / "run")
    assert resumed.history["train"]["loss"] == straight.history["train"]["loss"]
    assert resumed.final == straight.final
    expected = load_run(tmp_path / "straight")[1].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_run(tmp_path / "run")[1].state_dict().items())


def test_the_loss_is_the_mean_over_rows_with_pairs_however_they_are_split(recipe: Make, tmp_path: Path) -> None:
    whole, single = (run(recipe(micro), tmp_path / str(micro)).history["train"]["loss"] for micro in (None, 1))
    assert single == pytest.approx(whole, rel=1e-5)
    assert 5 < whole[0] < 16  # two cross-entropies over 257 ids, once for each row that has pairs


def test_a_batch_without_any_pair_is_said_to_be_one(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"objective belief-state scores nothing in the 6 sequences of step 0.*least gaps"
    ):
        run(recipe(gap_min=11), tmp_path / "run")
