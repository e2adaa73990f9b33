"""`torchstone recipe show` and `check`."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.cli import main as cli
from torchstone.cli.recipe import cost, human
from torchstone.recipe.load import load_recipe

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    assert caught.value.code in (0, None)
    return capsys.readouterr().out


def test_show_prints_a_recipe_with_its_cost_as_comments(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.block.mixer=differential", "budget.steps=10"]
    text = output(capsys, "recipe", "show", str(TINY), *overrides)
    assert load_recipe(text) == load_recipe(TINY, overrides)
    for name in ("parameters", "FLOPs per token", "memory for training", "steps", "tokens", "training FLOPs"):
        assert name in text
    assert f"# {'steps':<32}10\n" in text


def test_the_cost_adds_up() -> None:
    small, large = (load_recipe(TINY, [f"budget.steps={steps}"]) for steps in (10, 20))
    assert cost(small)["tokens"].startswith(f"{10 * small.batch.sequences * 128:,} ")
    assert cost(small)["parameters"] == cost(large)["parameters"]
    assert cost(load_recipe(small, ["model.depth=1"]))["parameters"] != cost(small)["parameters"]
    both, one = cost(small)["memory for training"], cost(load_recipe(small, ["precision=bf16"]))
    assert "in fp32" in both and "in bf16" in both
    assert "in fp32" not in one["memory for training"]


def test_check_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "recipe", "check", str(TINY), "budget.tokens_per_parameter=20")
    assert "is a valid recipe: decoder" in text
    assert "20 tokens per parameter" in text


def test_check_builds_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["recipe", "check", str(TINY), "model.block.mixer.heads=7"])
    assert caught.value.code == 2
    assert "7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (12, "12"), (1234, "1.23k"), (5e6, "5M"), (2.5e9, "2.5G"), (3e12, "3T"), (4e16, "40P")],
)
def test_human_numbers(number: float, text: str) -> None:
    assert human(number) == text
