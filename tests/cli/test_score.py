"""`torchstone score`: texts under two models, stores of a recipe's data, and requests that cannot be met."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe

from torchstone.cli.main import CONTINUING, main
from torchstone.data.loss_store import LossStore
from torchstone.errors import ConfigError, DataError
from torchstone.evals.scoring_command import Loading, score_recipe
from torchstone.recipe.load import load_recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.train.run import train


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    data = {
        "kind": "text",
        "corpus": {"kind": "files", "paths": str(folder / "text.txt")},
        "tokenizer": "bytes",
        "length": 24,
    }
    return tiny_recipe(data=data, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A text, its recipe, and two runs on it."""
    found = tmp_path_factory.mktemp("score")
    (found / "text.txt").write_text("".join(f"the {number} cats sat.\n" for number in range(400)))
    (found / "recipe.yaml").write_text(dump_yaml(load_recipe(recipe_of(found))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHSTONE_CACHE", str(found / "cache"))
        for seed in (0, 1):
            train(recipe_of(found, seed=seed), found / f"run{seed}", progress=lambda state: None)
        train(tiny_recipe(), found / "recall", progress=lambda state: None)
        score_recipe(found / "recipe.yaml", [], str(found / "run1"), found / "finished", loading=Loading("cpu"))
        yield found


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in ("score", *words)])
    return int(ended.value.code or 0)


def test_a_text_is_coloured_and_its_tokens_are_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.txt").write_text("the 7 cats sat on <b>.\n" * 4)
    out = folder / "out"
    words = ("text", folder / "mine.txt", "--model", folder / "run0", "--reference", folder / "run1", "--ratio", "0.5",
             "--out", out, "--device", "cpu")  # fmt: skip
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert "would be selected at a ratio of 0.5" in said and str(out / "report.html") in said
    rows = [json.loads(line) for line in (out / "tokens.jsonl").read_text().splitlines()]
    assert "".join(row["piece"] for row in rows) == (folder / "mine.txt").read_text()
    assert sum(row["selected"] for row in rows) == int(0.5 * (len(rows) - 1))
    finding = json.loads((out / "finding.json").read_text())
    assert finding["command"].startswith("torchstone score text") and finding["environment"]["device"] == "cpu"
    before = (out / "tokens.jsonl").read_bytes()
    assert run(*words) == 0
    assert (out / "tokens.jsonl").read_bytes() == before


def test_options_of_opening_are_honoured_and_part_of_the_command(folder: Path) -> None:
    (folder / "half.txt").write_text("the 9 cats sat.\n" * 4)
    words = ("text", folder / "half.txt", "--model", folder / "run0", "--reference", folder / "run1", "--device", "cpu")
    for dtype in ("float32", "bfloat16"):
        assert run(*words, "--dtype", dtype, "--out", folder / dtype) == 0
    whole, half = (json.loads((folder / dtype / "finding.json").read_text()) for dtype in ("float32", "bfloat16"))
    assert "--dtype bfloat16" in half["command"] and "--dtype" not in whole["command"]
    tables = [one["tables"][0]["rows"][0][2] for one in (whole, half)]
    assert tables[0] != tables[1] and tables[0] == pytest.approx(tables[1], rel=0.05)


def test_a_store_is_written_and_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = folder / "store"
    assert run("data", folder / "recipe.yaml", "--reference", folder / "run1", "--store", store, "--device", "cpu") == 0
    assert "windows of 24 targets are scored" in capsys.readouterr().out
    LossStore(store).verify()
    plain = recipe_of(folder, objective={"kind": "selective", "ratio": 0.6})
    scored = {**plain, "data": {"kind": "scored", "source": plain["data"], "scores": str(store)}}
    summary = train(scored, folder / "selective", progress=lambda state: None)
    assert summary.history["train"]["selected_share"] == pytest.approx([0.6] * 3, abs=0.01)


TEXT = ("text", "mine.txt", "--model", "run0", "--reference")
DATA = ("data", "recipe.yaml", "--reference", "run1", "--store")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((*TEXT, "recall"), ConfigError, "reference vocab 16 ≠ model vocab 257"),
        ((*TEXT, "run1", "--ratio", "1.5"), ConfigError, "ratio is 1.5"),
        (("text", "none.txt", *TEXT[2:], "run1"), DataError, "none.txt"),
        ((*DATA, "x", "data=noisy-trigram"), ConfigError, "objective.reference"),
        ((*DATA, "finished", "data.length=16"), ConfigError, "holds the losses of"),
        ((*DATA, "x", "--precision", "int8"), ConfigError, "float16, float32"),
        ((*DATA, "x", "--dtype", "int8"), ConfigError, "float32, bfloat16, float16"),
        ((*DATA, "x", "--reference-revision", "main"), ConfigError, "revision was given and has no meaning for run1"),
        ((*TEXT, "run1", "--revision", "main"), ConfigError, "revision was given and has no meaning for run0"),
        ((*TEXT, "run1", "--trust-remote-code"), ConfigError, "no meaning for run0 and run1"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_paragraph(
    folder: Path, words: tuple[str, ...], code: type, said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    (folder / "mine.txt").write_text("the 7 cats sat.\n")
    assert run(*words, "--device", "cpu") == code.exit_code  # type: ignore[attr-defined]
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_the_same_command_continues_and_says_so() -> None:
    assert "score" in CONTINUING


@pytest.mark.parametrize("words", [("--help",), ("text", "--help"), ("data", "--help")])
def test_help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 0
    assert "reference" in capsys.readouterr().out.lower()
