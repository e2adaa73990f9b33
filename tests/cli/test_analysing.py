"""Commands made from analysis functions: options from signatures, values in their types, what is written and printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from torchstone.cli.analysing import group, settings_of
from torchstone.diagnose.catalogue import ANALYSES, Analysis
from torchstone.errors import ConfigError
from torchstone.evals.catalogue import EVALUATIONS
from torchstone.report.finding import Finding
from torchstone.report.result import Table

CALLS: list[dict[str, Any]] = []


def count_words(
    texts: Sequence[str],
    *,
    ranks: tuple[int, ...] | None = None,
    scale: float = 1.5,
    mode: Literal["mean", "zero"] = "mean",
    pairs: str | Path | None = None,
    quick: bool = False,
) -> Finding:
    """Count words.

    Args:
        texts: documents.
        ranks: what to try; default: all of
            them.
        scale, mode: two settings.

    Raises:
        ConfigError: never.
    """
    CALLS.append({"ranks": ranks, "scale": scale, "mode": mode, "pairs": pairs, "quick": quick, "texts": list(texts)})
    words = sum(len(text.split()) for text in texts)
    rows = tuple((index, words) for index in range(20))
    table = Table(title="Words", columns=("row", "words"), rows=rows)
    return Finding(analysis="words", title="Words", question="How many?", subject="text", answer=f"{words} words.",
                   control="None.", tables=(table,))  # fmt: skip


APP = group("count", {"words": Analysis(f"{__name__}:count_words", "Count words.")}, "Count things.")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("one two three\n")
    return path


def invoke(*words: str) -> Any:
    CALLS.clear()
    return CliRunner().invoke(APP, list(words), catch_exceptions=False)


def test_settings_come_from_signature_and_docstring() -> None:
    settings = settings_of(count_words)
    assert list(settings) == ["ranks", "scale", "mode", "pairs", "quick"]
    assert settings["ranks"][2] == "What to try; default: all of them."
    assert settings["scale"][1:] == (1.5, "Two settings.") and settings["mode"][2] == "Two settings."


def test_values_arrive_in_their_types(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = invoke("words", str(text), "--ranks", "1, 8,64", "--scale", "2", "--mode", "zero", "--pairs", "p.jsonl", "--quick",
                   "--out", str(out))  # fmt: skip
    assert found.exit_code == 0
    assert [{"ranks": (1, 8, 64), "scale": 2.0, "mode": "zero", "pairs": Path("p.jsonl"), "quick": True,
                      "texts": ["one two three\n"]}] == CALLS  # fmt: skip
    written = json.loads((out / "finding.json").read_text())
    assert written["command"].startswith(f"torchstone count words {text} --ranks 1,8,64 --scale 2.0 --mode zero")
    assert written["created"] and written["environment"]["torch"]
    assert "3 words." in found.stdout and "8 more rows" in found.stdout and str(out / "report.html") in found.stdout


def test_defaults_are_left_out_of_the_command(text: Path, tmp_path: Path) -> None:
    invoke("words", str(text), "--out", str(tmp_path / "out"))
    assert CALLS[0]["ranks"] is None and CALLS[0]["mode"] == "mean"
    command = json.loads((tmp_path / "out" / "finding.json").read_text())["command"]
    assert command == f"torchstone count words {text} --out {tmp_path / 'out'}"


def test_wrong_values_are_explained(text: Path) -> None:
    with pytest.raises(ConfigError, match="comma-separated list of int"):
        invoke("words", str(text), "--ranks", "1,two")
    with pytest.raises(ConfigError, match="no analysis 'word'"):
        invoke("word")
    assert invoke("words", str(text), "--mode", "median").exit_code == 2


@pytest.mark.parametrize("name", [*ANALYSES, *EVALUATIONS])
def test_every_analysis_has_a_command_whose_options_are_explained(name: str) -> None:
    import importlib

    analysis = (ANALYSES | EVALUATIONS)[name]
    module, _, attribute = analysis.target.partition(":")
    settings = settings_of(getattr(importlib.import_module(module), attribute))
    assert [setting for setting, (_, _, help) in settings.items() if not help] == []
    app = group("x", {name: analysis}, "x")
    assert CliRunner().invoke(app, [name, "--help"], catch_exceptions=False).exit_code == 0
