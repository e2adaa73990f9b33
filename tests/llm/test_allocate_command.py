"""`torchstone allocate`: tables, files, warnings on stderr, one paragraph and an exit code for errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from torchstone.cli.main import main
from torchstone.llm.allocation import allocate, train_selected_pure
from torchstone.llm.allocation.populations import generate_table


def write_table(folder: Path, names: tuple[str, ...] = ("cold", "warm", "hot"), overlap: bool = False) -> Path:
    table = generate_table("complementary", 40, len(names), 16, np.random.default_rng(0))
    rows = [["problem", "split", *names], ["runs", "", *["16"] * len(names)]]
    for index, counts in enumerate(table.counts.tolist()):
        rows.append([f"p{index % 20 if overlap else index}", "train" if index < 20 else "test", *map(str, counts)])
    path = folder / "table.csv"
    path.write_text("\n".join(",".join(row) for row in rows))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["allocate", *words])
    code = stop.value.code
    shown = capsys.readouterr()
    return (code if isinstance(code, int) else 0), shown.out, shown.err


def test_json_holds_the_allocation_of_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path)
    code, out, err = run(capsys, str(path), "--budget", "8", "--json")
    answer = json.loads(out)
    counts = generate_table("complementary", 40, 3, 16, np.random.default_rng(0)).counts
    found = allocate(counts[:20], 16, 8)
    assert (code, err) == (0, "")
    assert list(answer["allocation"].values()) == found.counts.tolist()
    assert answer["curve"][-1]["mixed"] == pytest.approx(found.evaluate(counts[20:], 16).value)
    assert train_selected_pure(counts[:20], 16, 8).sum() == 8


def test_tables_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out_folder = tmp_path / "deep" / "out"
    code, out, _ = run(
        capsys, str(write_table(tmp_path)), "--budget", "8", "--split", "kfold:4", "--out", str(out_folder)
    )
    assert code == 0
    for text in ("Allocation of a budget of 8", "hot", "within", "4 folds over 40 problems", "Diagonal"):
        assert text in out
    assert {path.name for path in out_folder.iterdir()} == {
        "allocation.csv", "order.csv", "curve.csv", "adds.csv", "allocation.json",
    }  # fmt: skip
    assert json.loads((out_folder / "allocation.json").read_text())["budget"] == 8


def test_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text('{"cold": 1, "warm": 1, "hot": 4}')
    code, out, _ = run(capsys, str(write_table(tmp_path)), "--budget", "6", "--cost", str(cost), "--json")
    chosen = json.loads(out)["allocation"]
    assert code == 0 and chosen["cold"] + chosen["warm"] + 4 * chosen["hot"] <= 6


def test_overlap_is_warned_of_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, str(write_table(tmp_path, overlap=True)), "--budget", "4")
    assert code == 0
    assert "warning: 20 of 20 test problems are also training problems" in err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--budget", "60"], 3, "only 16 runs"),
        (["--budget", "0"], 2, "pays for no sample"),
        (["--budget", "4", "--method", "best"], 2, "unknown allocation method"),
        (["--budget", "4", "--split", "fold"], 3, "no column 'fold'"),
        (["--budget", "4", "--split", "kfold:1"], 2, "2 to 40 folds"),
        (["--budget", "4", "--cost", "absent.json"], 3, "cannot read"),
    ],
)
def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str) -> None:
    found, out, err = run(capsys, str(write_table(tmp_path)), *words)
    assert (found, out) == (code, "")
    assert text in err and err.count("\n") == 1 and "Traceback" not in err


def test_names_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = ("\x1b[2Jcold", "[bold]warm[/bold]", "h\u202eot")
    code, out, _ = run(capsys, str(write_table(tmp_path, hostile)), "--budget", "8")
    assert code == 0
    assert "\x1b" not in out and "\u202e" not in out and "[bold]warm[/bold]" in out
