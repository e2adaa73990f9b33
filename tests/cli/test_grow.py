"""`torchstone grow`: prints the report, leaves a run that `train` continues, refuses options that exclude each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from torchstone.cli import main as cli
from torchstone.recipe.load import load_recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.train.run import train

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(words))
        found = capsys.readouterr()
        return int(caught.value.code or 0), found.out, found.err

    return call


def recipe(block: dict[str, Any]) -> dict[str, Any]:
    plain = tiny_recipe()
    return plain | {"model": {**plain["model"], "block": block}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grow") / "small"
    train(recipe({"feedforward": "pattention", "projection": "pattention"}), directory, progress=lambda state: None)
    return directory


def test_grow_and_train_on(command: Call, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    code, text, problems = command("grow", str(small), "--out", str(out))
    assert code == 0 and problems == ""
    assert "32 to 64 in 8 layers, 128 to 256 in 2 layers" in text and "keys zero, values random, tau fixed" in text
    assert "step 3 of 3" in text
    assert (
        f"torchstone train {out}/recipe.yaml budget.steps=N --out {out} (give N above 3, the budget is spent)" in text
    )
    code, _, problems = command("train", str(out / "recipe.yaml"), "--out", str(out))
    assert code == 2 and "there is nothing to train" in problems and "budget.steps=N with N above 3" in problems
    code, text, _ = command("train", str(out / "recipe.yaml"), "budget.steps=5", "--out", str(out))
    assert code == 0 and "validation loss" in text
    assert load_recipe(out / "recipe.yaml").budget.steps == 5


def test_choices_reach_the_growth(command: Call, small: Path, tmp_path: Path) -> None:
    words = ["--tokens", "feedforward=160", "--tokens", "input=40", "--keys", "random", "--values", "zero",
             "--tau", "following", "--freeze-old", "--seed", "3", "--step", "3"]  # fmt: skip
    code, _, _ = command("grow", str(small), "--out", str(tmp_path / "grown"), *words)
    assert code == 0
    settings = json.loads((tmp_path / "grown" / "growth.json").read_text())["report"]["settings"]
    assert settings == {"keys": "random", "values": "zero", "tau": "following", "old tokens": "frozen"}
    block: Any = load_recipe(tmp_path / "grown" / "recipe.yaml").model.block
    assert (block.projection.input_tokens, block.projection.frozen_input_tokens) == (40, 32)
    assert (block.feedforward.tokens, block.feedforward.frozen_tokens) == (160, 128)
    assert (block.projection.output_tokens, block.projection.frozen_output_tokens) == (32, 0)


def test_widen(command: Call, tmp_path: Path) -> None:
    given = tmp_path / "recipe.yaml"
    given.write_text(dump_yaml(recipe({"feedforward": {"kind": "mlp", "hidden": 64}})))
    assert command("train", str(given), "--out", str(tmp_path / "small"))[0] == 0
    code, text, _ = command(
        "grow", str(tmp_path / "small"), "--widen", "--factor", "1.5", "--out", str(tmp_path / "wide")
    )
    assert code == 0 and "hidden units      64 to 96 in 2 layers" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widen", "--keys", "zero", "--freeze-old"], "have no freeze_old, keys"),
        (["--factor", "2", "--tokens", "input=40"], "give one of them"),
        (["--tokens", "input"], "not of the form USE=NUMBER"),
        (["--factor", "0.5"], "not taken away"),
        (["--factor", "nan"], "the factor is nan"),
        (["--factor", "1e12"], "a layer has at most"),
        (["--keys", "zero", "--values", "zero"], "stay dead"),
        (["--keys", "some"], "keys is 'some'"),
    ],
)
def test_options_that_cannot_be(command: Call, small: Path, tmp_path: Path, words: list[str], message: str) -> None:
    code, _, problems = command("grow", str(small), "--out", str(tmp_path / "grown"), *words)
    assert code == 2 and message in problems
    assert not (tmp_path / "grown").exists()


def test_the_end_may_be_named_with_the_growth(command: Call, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    code, text, _ = command("grow", str(small), "--out", str(out), "--until", "5")
    assert code == 0 and "step 3 of 5" in text
    assert f"torchstone train {out}/recipe.yaml --out {out} (budget.steps=N sets another end)" in text
    assert command("train", str(out / "recipe.yaml"), "--out", str(out))[0] == 0
    code, _, problems = command("grow", str(small), "--out", str(tmp_path / "other"), "--until", "3")
    assert code == 2 and "nothing would be left to train" in problems
