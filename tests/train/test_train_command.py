"""`torchstone train` and `torchstone generate` as a user calls them: output, exit codes, no tracebacks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_recipe
from typer.testing import CliRunner

from torchstone.cli.main import app, main
from torchstone.recipe.load import load_recipe
from torchstone.recipe.yaml import dump_yaml


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a recipe on text, a corpus, and a cache of its own."""
    rows = "".join(json.dumps({"text": f"row {n}: {n} and {n} is {n + n}."}) + "\n" for n in range(1000))
    (tmp_path / "rows.jsonl").write_text(rows)
    corpus = {"kind": "files", "paths": "rows.jsonl"}
    data = {"kind": "text", "corpus": corpus, "tokenizer": "bytes", "length": 32}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHSTONE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.yaml").write_text(dump_yaml(load_recipe(tiny_recipe(data=data))))
    (tmp_path / "recall.yaml").write_text(dump_yaml(load_recipe(tiny_recipe())))
    return tmp_path


def start(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torchstone", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The entry point in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    found = capsys.readouterr()
    code = caught.value.code
    return (code if isinstance(code, int) else 0), found.out, found.err


def test_training_then_writing_in_child_processes(place):
    child = start("train", "text.yaml", "budget.steps=20", "--out", "run")
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    shown = {line[:17].strip(): line[17:] for line in out.splitlines()}
    assert list(shown) == [
        "steps", "tokens", "parameters", "training loss", "validation loss", "bits per byte", "accuracy", "checkpoint",
    ]  # fmt: skip
    assert shown["steps"] == "20" and shown["tokens"].startswith("2,560 (")
    assert Path(shown["checkpoint"]).is_dir()
    child = start("generate", "run", "--prompt", "row 1", "--max-new", "12", "--greedy")
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")
    assert 0 < len(out.rstrip("\n")) <= 12


def test_a_signal_saves_and_the_same_command_continues(place, capsys):
    words = ("train", "recall.yaml", "schedule.warmup=0", "budget.steps=100000", "--out", "run")
    child = start(*words)
    metrics = place / "run" / "metrics.jsonl"
    end = time.monotonic() + 90
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < end and child.poll() is None, "training did not start"
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("torchstone: stopped by SIGTERM after step ") and "The same command continues" in last
    done = int(last.split("after step ")[1].split()[0])
    shorter = ("train", "recall.yaml", "schedule.warmup=0", f"budget.steps={done + 2}", "--out", "run")
    code, out, err = call(capsys, *shorter)
    assert code == 0 and out.startswith(f"steps            {done + 2:,}\n")
    assert "changed since the run was started: budget.steps was 100000" in err


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("recall.yaml", "model.widht=3"), 2, "widht"),
        (("nothing.yaml",), 2, "there is no recipe nothing.yaml"),
        (("recall.yaml", "--allow", "model", "--out", "there"), 2, "cannot allow changes of model"),
        (("text.yaml", "data.corpus.paths=missing.jsonl"), 3, "missing.jsonl"),
        (("text.yaml", "evaluation.sequences=100000"), 3, "held-out text has"),
        (("recall.yaml", "optimizer.learning_rate=1e30", "budget.steps=9"), 4, "lower optimizer.learning_rate"),
    ],
)  # fmt: skip
def test_errors_are_a_paragraph_and_a_code(place, capsys, words, code, message):
    call(capsys, "train", "recall.yaml", "budget.steps=1", "--out", "there")
    found, out, err = call(capsys, "train", *words)
    assert (found, out) == (code, "")
    assert message in err and "Traceback" not in err
    assert sum(line.startswith("torchstone: ") for line in err.splitlines()) == 1


def test_debug_shows_the_traceback(place, capsys):
    code, _, err = call(capsys, "train", "nothing.yaml", "--debug")
    assert code == 2 and "Traceback" in err


def test_without_out_the_directory_is_named_after_the_recipe(place, capsys):
    code, out, _ = call(capsys, "train", "recall.yaml")
    assert code == 0
    (folder,) = (place / "runs").iterdir()
    assert folder.name.startswith("train-") and len(folder.name) == 16
    call(capsys, "train", "recall.yaml", "checkpoint.keep=7")
    assert [item.name for item in (place / "runs").iterdir()] == [folder.name]
    code, again, _ = call(capsys, "train", "recall.yaml")
    assert (code, again) == (0, out)
    assert call(capsys, "train", "recall.yaml", "--no-resume")[0] == 2


def test_what_a_completion_depends_on(place, capsys):
    call(capsys, "train", "text.yaml", "budget.steps=40", "--out", "run")

    def text(*words: str) -> str:
        code, out, err = call(capsys, "generate", "run", "--prompt", "row 7", "--max-new", "24", *words)
        assert code == 0, err
        return out.removesuffix("\n")

    assert text("--seed", "1") == text("--seed", "1")
    assert len({text("--seed", str(seed)) for seed in range(3)}) > 1
    greedy = text("--greedy")
    assert greedy == text("--top-k", "1") == text("--top-p", "1e-9", "--temperature", "0.5")
    ends = greedy[2:4]
    assert text("--greedy", "--stop", ends) == greedy[: greedy.index(ends)]
    assert text("--greedy", "--step", "40") == greedy


@pytest.mark.parametrize(
    "words, code, message",
    [
        (("run", "--prompt", "x"), 2, "no tokenizer"),
        (("nowhere", "--prompt", "x"), 2, "holds no run"),
        (("run", "--prompt", "x", "--step", "9"), 3, "no checkpoint of step 9"),
    ],
)
def test_what_generate_refuses(place, capsys, words, code, message):
    call(capsys, "train", "recall.yaml", "--out", "run")
    found, out, err = call(capsys, "generate", *words)
    assert (found, out) == (code, "") and message in err


def test_greedy_with_chance_settings_is_refused(place, capsys):
    call(capsys, "train", "text.yaml", "--out", "run")
    code, _, err = call(capsys, "generate", "run", "--prompt", "x", "--greedy", "--temperature", "0.5")
    assert code == 2 and "greedy" in err


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_help_names_every_option(verb):
    shown = CliRunner().invoke(app, [verb, "--help"]).output
    options = {
        "train": ["--out", "--no-resume", "--fallback", "--allow"],
        "generate": ["--prompt", "--top-p", "--step"],
    }
    assert all(option in shown for option in options[verb])
