"""`torchstone runs`: the tree as text and as a page, its default folder, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_recipe

from torchstone.cli import main as cli
from torchstone.train.branch import branch_run
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    plain = tiny_recipe(schedule={"kind": "constant", "warmup": 0}, checkpoint={"every": 1, "keep": 9})
    train(plain, place / "trunk", progress=lambda state: None)
    train(
        branch_run(f"{place / 'trunk'}@2", place / "decayed", decay=2), place / "decayed", progress=lambda state: None
    )
    return place


def test_the_tree_is_printed_and_the_report_written(command: Call, folder: Path, tmp_path: Path) -> None:
    code, text, problems = command("runs", str(folder), "--out", str(tmp_path / "report"))
    assert code == 0 and problems == ""
    trunk, branch, answer, place = text.splitlines()
    assert trunk.startswith("trunk: run, constant, 3 steps, ")
    assert branch.startswith("  decayed: branch from step 2, wsd, 2 steps, ") and "gained " in branch
    assert answer.startswith("decayed gained: ")
    assert place == f"report: {tmp_path / 'report' / 'report.html'}"
    finding = json.loads((tmp_path / "report" / "finding.json").read_text())
    assert finding["command"] == f"torchstone runs {folder} --out {tmp_path / 'report'}" and finding["created"]
    assert [row[0] for row in finding["tables"][0]["rows"]] == ["trunk", "decayed"]


def test_without_out_the_same_runs_have_the_same_folder(
    command: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {command("runs", *words)[1].splitlines()[-1] for words in ([str(folder)], [str(folder / "decayed")])}
    assert len(places) == 1 and places.pop().startswith("report: runs/tree-")


def test_a_terminal_shows_lines(command: Call, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    code, text, _ = command("runs", str(folder), "--out", str(tmp_path / "report"))
    assert code == 0 and "└── decayed: branch from step 2" in text


def test_problems_are_warnings(command: Call, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more" / "broken").mkdir(parents=True)
    (tmp_path / "more" / "broken" / "run.json").write_text("{")
    code, text, problems = command("runs", str(folder), str(tmp_path / "more"), "--out", str(tmp_path / "report"))
    assert code == 0 and problems.startswith("warning: left out: ") and "trunk: run" in text


def test_what_holds_no_run_is_refused(command: Call, tmp_path: Path) -> None:
    code, _, problems = command("runs", str(tmp_path))
    assert code == 2 and "no run there" in problems
