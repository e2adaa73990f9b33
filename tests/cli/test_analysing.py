"""Commands made from analysis functions: options from signatures, values in their types, what is written and printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from families import FAMILIES, tiny_model
from subjects import byte_subject
from typer.testing import CliRunner

from torchstone.cli.analysing import group, settings_of
from torchstone.diagnose.catalogue import ANALYSES, Analysis
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, InterruptedRun
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


def look(
    subject: Subject | None, texts: Sequence[str], *, directory: str | Path | None = None, rounds: int = 1
) -> Finding:
    """Look at a model.

    Args:
        subject: a model, or None.
        texts: documents.
        directory: where parts are kept.
        rounds: how often; none is an interruption.
    """
    CALLS.append({"subject": subject, "directory": directory})
    if not rounds:
        raise KeyboardInterrupt
    table = Table(title="[/T]", columns=("[/A] of", ":smile:"), rows=(("[/A]", 1), ("[red]x", 2)))
    return Finding(analysis="look", title="Look", question="?", subject="s", answer="[/A] is :smile:", control="None.",
                   tables=(table,))  # fmt: skip


def glance(subject: Subject, *, rounds: int = 1) -> Finding:
    """Look at a model without keeping anything; see `look`."""
    return look(subject, (), rounds=rounds)


APP = group(
    "count",
    {
        "words": Analysis(f"{__name__}:count_words", "Count words."),
        "look": Analysis(f"{__name__}:look", "Look."),
        "glance": Analysis(f"{__name__}:glance", "Look."),
    },
    "Count things.",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("one two three\n")
    return path


def invoke(*words: str) -> Any:
    CALLS.clear()
    return CliRunner().invoke(APP, list(words), catch_exceptions=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What `open_subject` is asked for; it gives a small decoder. The working folder is empty."""
    asked: list[dict[str, Any]] = []

    def open_subject(source: str, **options: Any) -> Subject:
        asked.append({"source": source, **options})
        return byte_subject()

    monkeypatch.setattr("torchstone.diagnose.adapters.open_subject", open_subject)
    monkeypatch.chdir(tmp_path)
    return asked


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


def test_the_first_gpu_is_the_default_and_devices_are_checked_before_the_model(
    opened: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("glance", "m")
    assert opened[-1]["device"] == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    invoke("glance", "m")
    assert opened[-1]["device"] == torch.device("cuda")
    invoke("glance", "m", "--device", "cpu")
    assert opened[-1]["device"] == torch.device("cpu")
    opened.clear()
    with pytest.raises(ConfigError, match="no device 'gpu' .*has: cpu, cuda:0"):
        invoke("glance", "m", "--device", "gpu")
    assert opened == []


def test_options_of_the_model_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    tiny_model("Llama").save_pretrained(tmp_path / "llama")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "w1": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    invoke("glance", "llama", "--dtype", "bfloat16", "--tokenizer", "words", "--device", "cpu")
    subject = CALLS[0]["subject"]
    assert next(subject.model.parameters()).dtype == torch.bfloat16
    assert subject.encode("w1") == [1]
    invoke("glance", "llama", "--device", "cpu")
    assert next(CALLS[0]["subject"].model.parameters()).dtype == torch.float32
    assert invoke("glance", "llama", "--dtype", "int8").exit_code == 2


@pytest.mark.parametrize(("names", "message"), [
    (["q=("], "no regular expression"), (["query=x"], "takes k=PATTERN, o=PATTERN, q=PATTERN"), (["q"], "given 'q'"),
    (["q=a", "q=b"], "each once"),
])  # fmt: skip
def test_patterns_of_names_are_checked(names: list[str], message: str, opened: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke("glance", "m", *(word for name in names for word in ("--names", name)))
    assert opened == []
    invoke("glance", "m", "--names", "q=a|b", "--names", "qkv=c")
    assert opened[0]["names"] == {"q": "a|b", "qkv": "c"}


@pytest.mark.parametrize("option", [
    ["--step", "0"], ["--revision", "main"], ["--device", "cpu"], ["--names", "q=x"], ["--trust-remote-code"],
    ["--dtype", "float32"], ["--tokenizer", "x"],
], ids=lambda words: words[0])  # fmt: skip
def test_options_of_a_model_are_refused_where_there_is_none(option: list[str], text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{option[0]} is an option of a model"):
        invoke("look", "bytes", str(text), *option)
    assert CALLS == []
    assert invoke("look", "bytes", str(text), "--out", str(tmp_path / "out")).exit_code == 0


def test_brackets_in_numbers_and_names_are_no_markup(text: Path, tmp_path: Path) -> None:
    printed = invoke("look", "bytes", str(text), "--out", str(tmp_path / "[out]")).stdout
    assert all(words in printed for words in ("[/T]", "[/A] of", "[/A] is :smile:", "[red]x", "[out]"))


def test_everything_asked_has_a_folder_of_its_own(opened: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    asked = [
        ["org/m"], ["org/m", "--revision", "r"], ["org/m", "--step", "3"], ["org/m", "--dtype", "bfloat16"], ["other/m"],
        ["org/m", "--rounds", "2"], ["org/m", "--tokenizer", "t"], ["org/m", "--names", "q=x"], ["a"], ["b"],
    ]  # fmt: skip
    for words in asked:
        invoke("glance", *words)
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert len(folders) == len(asked)
    assert {name.rpartition("-")[0] for name in folders} == {"glance-m", "glance-a", "glance-b"}
    for words in (["org/m"], ["org/m", "--dtype", "float32"], ["org/m", "--device", "cpu"], [str(tmp_path / "a")]):
        invoke("glance", *words)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == folders


def test_texts_count_for_the_folder(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").write_text("four\n")
    for words in (["a.txt"], ["b.txt"], ["a.txt", "b.txt"], [str(text)]):
        invoke("words", *words)
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_partial_results_are_kept_in_the_folder_so_that_the_same_command_continues(
    opened: list[dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    invoke("look", "m", str(text))
    (folder,) = (tmp_path / "runs").iterdir()
    assert Path(CALLS[0]["directory"]) == folder.relative_to(tmp_path)
    assert "--directory" not in json.loads((folder / "finding.json").read_text())["command"]
    invoke("look", "m", str(text), "--out", "x")
    assert CALLS[0]["directory"] == Path("x")
    invoke("look", "m", str(text), "--directory", "d")
    assert CALLS[0]["directory"] == Path("d")


def test_an_interruption_says_what_is_kept(opened: list[dict[str, Any]], text: Path) -> None:
    with pytest.raises(InterruptedRun, match="nothing of this analysis is kept.* begins anew"):
        invoke("glance", "m", "--rounds", "0")
    with pytest.raises(InterruptedRun, match="kept in x, and the same command continues"):
        invoke("look", "m", str(text), "--rounds", "0", "--out", "x")


def test_the_guide_names_every_family_that_is_tested() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    proven = guide.partition("Models of these families")[2].partition(".")[0]
    assert [family for family in FAMILIES if family.partition("-")[0] not in proven] == []
