"""`torchstone plan`: tables, plot, files, and bad input in one paragraph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchstone.cli import main as cli
from torchstone.recipe.registry import kinds

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(TINY), "data={kind: bigram}", *words])
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize("kind", kinds("schedule"))
def test_every_kind_has_a_plan(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, f"schedule={kind}", "budget.steps=100")
    assert code == 0
    assert f"Schedule {kind}, peak 0.003: 100 steps" in out
    assert "rate from" in out and "checkpoint" in out and "^" in out


def test_a_plan_of_several_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "schedule={kind: wsd-s, cycles: [250, 500], warmup: 20, shape: linear}"
    code, out, _ = run(capsys, schedule, "budget.steps=1000")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["warmup", "0", "-", "19"] in [row[:4] for row in rows]
    assert ["stable", "250", "-", "474"] in [row[:4] for row in rows]
    tail = [row for row in rows if row[:1] in (["250"], ["500"], ["1,000"])]
    # warmup, stable and decay behind each checkpoint, and what WSD would have at the same cost
    assert [row[3:] for row in tail] == [
        ["20", "205", "25", "250"],
        ["20", "430", "50", "475"],
        ["20", "880", "100", "950"],
    ]
    assert out.count("^") == 3


def test_json_and_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(
        capsys, "schedule={kind: wsd-s, cycles: 2}", "budget.steps=40", "--json", "--out", str(tmp_path / "p")
    )
    assert code == 0
    assert [budget["step"] for budget in json.loads(out)["served"]] == [20, 40]
    assert "Wrote plan.json, plan.svg" in err
    assert json.loads((tmp_path / "p" / "plan.json").read_text()) == json.loads(out)


def test_long_tables_are_cut_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schedule={kind: wsd-s, cycles: 100, warmup: 0}", "budget.steps=2000")
    assert code == 0 and "… 160 more" in " ".join(out.split()) and "… 60 more" in out
    assert "- 1,999" in out and any(line.startswith("     2,000 ") for line in out.splitlines())  # the last rows
    assert len(out.splitlines()) < 120


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["schedule={kind: wsd-s, warmup: 30, decay: 80}", "budget.steps=100"],
            "cycle 0: warmup 30 + decay 80 exceeds 100 steps",
        ),
        (["schedule={kind: wsd-s, final: 0}"], "never reaches final 0"),
        (
            ["schedule={kind: wsd-s, cycles: 2, cycle_length: 10}"],
            "cycles and cycle_length both say where the cycles end",
        ),
        (["schedule={kind: wsd-s, cycles: [50, 20]}", "budget.steps=100"], "ends do not increase"),
        (["schedule={kind: wsd-s, decay: 1.5}"], "decay 1.5 is neither a fraction"),
        (["schedule={kind: wsd-s, floor: 0.1}"], "unknown key schedule.floor"),
        (["schedule=wsds"], "Did you mean 'wsd-s'?"),
    ],
)
def test_bad_input_is_one_paragraph(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and out == ""
    assert message in " ".join(err.split()) and len(err.strip().splitlines()) == 1
    assert "Value error" not in err and "Traceback" not in err
