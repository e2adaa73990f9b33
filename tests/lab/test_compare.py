"""`compare` from the inside: names, claims, tuning, designs and the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_recipe

from torchstone.errors import BudgetError, ConfigError
from torchstone.evals.ar_loss import ar_losses
from torchstone.lab.compare import compare
from torchstone.lab.progress import Quiet
from torchstone.lab.runner import RunOptions
from torchstone.lab.training import Matching
from torchstone.objectives.next_token import NextTokenConfig
from torchstone.recipe.load import load_recipe
from torchstone.report.numbers import size
from torchstone.train.run import load_run

INLINE = RunOptions(on="inline")


def run(arms, out, recipe=None, **options):
    return compare(recipe or tiny_recipe(), arms, out=out, options=INLINE, progress=Quiet(), **{"seeds": 2, **options})


def test_arms_are_matched_paired_and_judged(tmp_path):
    finished = run({"v1": ["model.block.mixer=differential"], "v2": ["model.block.mixer={kind: differential, version: v2}"]},
                   tmp_path, match=Matching("params", tolerance=0.02))  # fmt: skip
    arms = {arm.name: arm for arm in finished.result.arms}
    assert abs(arms["v2"].parameters / arms["baseline"].parameters - 1) <= 0.02
    assert arms["v2"].match.free == "model.block.feedforward.hidden"
    assert [change.path for change in arms["v1"].intervention] == ["model.block.mixer.kind"]
    assert {verdict.claim for verdict in finished.verdicts} == {"v1", "v2"}
    assert all(len(verdict.pairs) == 2 for verdict in finished.verdicts)
    assert any("shared by all arms" in note for note in finished.result.notes)
    assert "model:" in finished.result.recipe_yaml


def test_an_arm_that_changes_nothing_ties_exactly(tmp_path):
    finished = run(["same:"], tmp_path)
    (verdict,) = finished.verdicts
    assert verdict.status == "inconclusive"
    assert [pair.contrast for pair in verdict.pairs] == [0.0, 0.0]


def test_tuning_gives_every_arm_its_own_rate_on_separate_seeds(tmp_path):
    finished = run(["v1:model.block.mixer=differential"], tmp_path, tune_seeds=1, grid=[1e-3, 1e-2], match="none")
    assert {arm.learning_rate_policy for arm in finished.result.arms} == {"tuned"}
    assert {arm.learning_rate for arm in finished.result.arms} <= {1e-3, 1e-2}
    _, table = finished.result.tables
    assert [row[:2] for row in table.rows] == [("baseline", 1e-3), ("baseline", 1e-2), ("v1", 1e-3), ("v1", 1e-2)]
    assert [row[0] for row in table.rows if row[3] == "selected"] == ["baseline", "v1"]
    assert any("edge of the grid" in note for note in finished.result.notes)
    cells = list((tmp_path / "tuning" / "cells").glob("*/seed-*"))
    assert len(cells) == 4
    assert all(int(cell.name.split("-")[1]) >= 1_000_000 for cell in cells)


def test_a_failing_arm_is_shown(tmp_path):
    finished = run(["hot:optimizer.learning_rate=1e30"], tmp_path, recipe=tiny_recipe(budget={"steps": 6}))
    (verdict,) = finished.verdicts
    assert verdict.status == "inconclusive"
    assert "hot seed 0: NonFiniteError" in verdict.reason


def test_the_claim_follows_the_metric(tmp_path):
    finished = run(["same:"], tmp_path, metric="accuracy", margin=0.1)
    (verdict,) = finished.verdicts
    assert (verdict.direction, verdict.margin, verdict.status) == (
        "greater",
        0.1,
        "fails" if verdict.interval else "inconclusive",
    )


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        ([], {}, "needs at least one arm"),
        (["baseline:batch.sequences=8"], {}, "cannot be named 'baseline'"),
        (["a:model.block.mixr=differential"], {}, "mixer"),
        (["a:batch.sequences=8"], {"metric": "beauty"}, "cannot compare by 'beauty'"),
        (["a:batch.sequences=8"], {"match": "size"}, "cannot match 'size'"),
        (["a:batch.sequences=8"], {"margin": -1.0}, "margin"),
        (["a:seed=1"], {}, "belong to the comparison"),
        (["a:optimizer.learning_rate=0.1"], {"tune_seeds": 1, "grid": [1e-3]}, "at least two different"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, arms, options, message):
    with pytest.raises(ConfigError, match=message):
        run(arms, tmp_path, **options)


def test_an_impossible_match_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(BudgetError, match="cannot match"):
        run(["wide:model.width=512"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe()))
    command = shutil.which("torchstone", path=str(Path(sys.executable).parent))
    arguments = [command, "compare", str(recipe), "--arm", "v1:model.block.mixer=differential", "--seeds", "2",
                 "--out", str(tmp_path / "out"), "--match", "none"]  # fmt: skip
    first = subprocess.run(arguments, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "v1 has a lower validation loss than the baseline" in first.stdout
    assert str(tmp_path / "out" / "report.html") in first.stdout
    assert "4/4" in first.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["verdicts"][0]["n"] == 2
    again = subprocess.run(arguments, capture_output=True, text=True)
    assert "4 of them finished before" in again.stderr
    idle = subprocess.run([*arguments, "--max-seeds", "9"], capture_output=True, text=True)
    assert (idle.returncode, "--until-decided" in idle.stderr) == (2, True)
    wrong = subprocess.run([*arguments, "--match", "size"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_tuning_by_accuracy_takes_the_highest(tmp_path):
    from torchstone.lab.comparison import METRICS
    from torchstone.lab.record import Outcome
    from torchstone.lab.study import Measurement
    from torchstone.lab.tuning import select, tuning_name

    outcomes = {(tuning_name("a", rate), 0): Outcome("f", Measurement({"accuracy": value, "validation_loss": value}))
                for rate, value in ((0.1, 0.2), (0.2, 0.9), (0.4, 0.9))}  # fmt: skip
    grids = {"a": (0.1, 0.2, 0.4)}
    assert select(grids, outcomes, METRICS["accuracy"]).rates == {"a": 0.2}
    assert select(grids, outcomes, METRICS["validation_loss"]).rates == {"a": 0.1}


def test_cells_on_changed_data_are_refused_and_not_kept(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("one two three four five six seven eight nine ten " * 400)
    data = {"kind": "text", "corpus": {"kind": "files", "paths": [str(text)]}, "tokenizer": "bytes", "length": 32}
    recipe = tiny_recipe(data=data, evaluation={"every": None, "sequences": 4})
    first = run(["hot:optimizer.learning_rate=0.01"], tmp_path / "out", recipe=recipe, seeds=1)
    assert {cell.status for cell in first.result.cells} == {"done"}
    text.write_text("ten nine eight seven six five four three two one " * 400)
    second = run(["hot:optimizer.learning_rate=0.01"], tmp_path / "out", recipe=recipe, seeds=2)
    failed = [cell for cell in second.result.cells if cell.status == "failed"]
    assert {cell.seed for cell in failed} == {1}
    assert all("never mixed" in cell.error for cell in failed)
    assert not (tmp_path / "out" / "cells" / "baseline" / "seed-1" / "cell.json").exists()


def test_the_report_holds_the_whole_command(tmp_path):
    finished = run(["same:"], tmp_path, match=Matching("flops", "depth", 0.01), margin=0.5)
    for word in ("--match flops", "--free depth", "--tolerance 0.01", "--margin 0.5", "--seeds 2"):
        assert word in finished.result.command


def test_every_arm_shows_what_generation_costs(tmp_path):
    arms = {
        "local": ["model.block.mixer={kind: attention, window: 4}"],
        "two-heads": ["model.block.mixer={kind: attention, kv_heads: 2}"],
    }
    finished = run(arms, tmp_path, match="none", seeds=1)
    length = load_recipe(tiny_recipe()).data.sequence_length()
    (table,) = finished.result.tables
    assert table.columns == ("arm", "time per token", "FLOPs per token", "state per sequence")
    assert f"After {4 * length} tokens" in table.note and "other cells shared" in table.note
    shown = {row[0]: row[1:] for row in table.rows}
    assert list(shown) == ["baseline", "local", "two-heads"]
    assert all(" ms" in row[0] for row in shown.values())
    assert "×" not in "".join(shown["baseline"])
    full = 2 * 4 * 2 * 4 * length * 32  # keys and values, fp32, two layers, width 32
    assert shown["baseline"][2] == size(full)
    assert shown["local"][2] == f"{size(full / length)} (×{1 / length:.2f})"
    assert shown["two-heads"][2] == f"{size(full / 2)} (×0.50)"
    costs = [
        json.loads(path.read_text())["measurement"]["extra"]["decoding"]
        for path in tmp_path.glob("cells/*/*/cell.json")
    ]
    assert {cost["context"] for cost in costs} == {4 * length}
    assert {cost["state_bytes"] for cost in costs} == {full, full / length, full / 2}


def test_tasks_show_answers_and_text_shows_recall(tmp_path):
    task = run(["same:"], tmp_path / "task", seeds=1).result
    assert [metric.name for metric in task.metrics] == ["validation_loss", "accuracy"]
    text = tmp_path / "notes.txt"
    text.write_text("one two three four five six seven eight nine ten " * 400)
    data = {"kind": "text", "corpus": {"kind": "files", "paths": [str(text)]}, "tokenizer": "bytes", "length": 32}
    recipe = tiny_recipe(data=data, evaluation={"every": None, "sequences": 4})
    finished = run(["same:"], tmp_path / "text", recipe=recipe, seeds=1)
    assert [metric.name for metric in finished.result.metrics] == ["validation_loss", "recall_loss"]
    assert {verdict.metric for verdict in finished.verdicts} == {"validation_loss"}
    _, model, source = load_run(tmp_path / "text" / "cells" / "same" / "seed-0" / "run")
    wanted = ar_losses(model, NextTokenConfig().build(), source, 4)["ar_hit_loss"]
    for cell in finished.result.cells:
        assert cell.metrics["recall_loss"] == pytest.approx(wanted, rel=1e-6)
    assert "loss on in-context recall" in (tmp_path / "text" / "report.html").read_text()


def test_text_without_recall_has_no_such_number(tmp_path):
    text = tmp_path / "noise.txt"
    text.write_text("".join(chr(0x21 + (7 * n * n + n // 90) % 90) for n in range(9000)))
    data = {"kind": "text", "corpus": {"kind": "files", "paths": [str(text)]}, "tokenizer": "bytes", "length": 4}
    recipe = tiny_recipe(data=data, evaluation={"every": None, "sequences": 2})
    finished = run(["same:"], tmp_path / "text", recipe=recipe, seeds=1)
    assert {cell.status for cell in finished.result.cells} == {"done"}
    assert all("recall_loss" not in cell.metrics for cell in finished.result.cells)
