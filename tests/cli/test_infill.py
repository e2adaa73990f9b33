"""`torchstone infill`: the gap between two texts from a trained run, and runs that cannot fill one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from torchstone.cli.infill import infill
from torchstone.errors import ConfigError
from torchstone.models.belief_generate import infill as write
from torchstone.models.belief_generate import prepend
from torchstone.storage.names import safe_text
from torchstone.train.run import load_run, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A belief-state run on bytes of a small text."""
    folder = tmp_path_factory.mktemp("infill")
    (folder / "text.txt").write_text("".join(f"the {number} cats sat.\n" for number in range(400)))
    text = {
        "kind": "text",
        "corpus": {"kind": "files", "paths": str(folder / "text.txt")},
        "tokenizer": "bytes",
        "length": 24,
    }
    model = {"kind": "belief-state", "width": 16, "depth": 1, "head_dim": 8, "end_token": 256}
    recipe = tiny_recipe(model=model, data=text, objective={"kind": "belief-state"}, budget={"steps": 2})
    train(recipe, folder / "run", progress=lambda state: None)
    return folder / "run"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("prefix", "goal"), [("the 3", " sat."), ("", "")])
def test_the_gap_is_printed(
    run: Path, backward: bool, prefix: str, goal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    infill(run, prefix=prefix, goal=goal, backward=backward, max_new=9, greedy=True)
    _, model, data = load_run(run)
    before = data.tokenizer.encode(prefix) or [256]
    wanted = (prepend if backward else write)(
        model, [before], [[*data.tokenizer.encode(goal), 256]], max_new=9, greedy=True
    )
    assert capsys.readouterr().out == safe_text(data.tokenizer.decode(wanted[0].tokens)) + "\n"
    assert len(wanted[0].tokens) > 0


def test_draws_follow_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in (0, 0, 1):
        infill(run, prefix="the", goal="sat.", max_new=12, seed=seed)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a goal needs a model with a backward encoder, and Decoder has none"),
        (
            {
                "model": {"kind": "belief-state", "width": 16, "depth": 1, "head_dim": 8, "end_token": 12},
                "data": {"kind": "star-graph"},
                "objective": {"kind": "belief-state", "gap_min": 2, "context_length": 20},
            },
            "trained on synthetic tokens, not on text",
        ),
    ],
)
def test_other_runs_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    train(tiny_recipe(**changes, budget={"steps": 1}), tmp_path / "run", progress=lambda state: None)
    with pytest.raises(ConfigError, match=words):
        infill(tmp_path / "run", prefix="a", goal="b")
