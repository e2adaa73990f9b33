"""The runner with a study of known numbers: caching, refusal, failures, leases, sequential seeds, report."""

from __future__ import annotations

import json
import threading
import time

import pytest
from coin import Coin, options

from torchstone.errors import DataError, InterruptedRun, StudyError, TorchstoneError
from torchstone.lab.progress import Lines, Quiet
from torchstone.lab.runner import StudyRun, run_study
from torchstone.lab.study import Arm, Claim, Measurement


@pytest.fixture
def coin(monkeypatch):
    study = Coin()
    monkeypatch.setattr("torchstone.lab.worker.from_reference", lambda reference: study)
    return study


def test_a_study_runs_every_cell_once_and_leaves_three_files(coin, tmp_path):
    finished = run_study(coin, options(tmp_path / "s"), Quiet())
    assert sorted(coin.runs) == [(arm, seed) for arm in "ab" for seed in range(3)]
    assert coin.prepared == 1
    assert finished.verdicts[0].status == "holds"
    assert {"result.json", "report.html", "report.md"} <= {path.name for path in (tmp_path / "s").iterdir()}
    data = json.loads((tmp_path / "s" / "result.json").read_text())
    assert len(data["cells"]) == 6
    assert data["cells"][0]["tokens"] == 10


def test_the_same_command_continues_and_reruns_nothing(coin, tmp_path):
    run_study(coin, options(tmp_path), Quiet())
    coin.runs.clear()
    again = run_study(coin, options(tmp_path), Quiet())
    assert coin.runs == []
    assert coin.prepared == 1
    assert again.verdicts[0].status == "holds"


def test_more_seeds_run_only_the_new_cells_and_the_report_says_that_numbers_were_seen(coin, tmp_path):
    run_study(coin, options(tmp_path), Quiet())
    coin.runs.clear()
    finished = run_study(coin, options(tmp_path, seeds=5), Quiet())
    assert sorted(coin.runs) == [(arm, seed) for arm in "ab" for seed in (3, 4)]
    assert any("with 3 seeds had been seen" in note for note in finished.result.notes)


def test_another_study_in_the_directory_is_refused(coin, tmp_path):
    run_study(coin, options(tmp_path), Quiet())
    with pytest.raises(StudyError, match="holds another study"):
        run_study(coin, options(tmp_path, scale="noise"), Quiet())


def test_an_unknown_scale_is_refused(coin, tmp_path):
    with pytest.raises(StudyError, match="scale 'huge' is not one of"):
        run_study(coin, options(tmp_path, scale="huge"), Quiet())


def test_a_failed_cell_is_kept_shown_and_not_rerun(coin, tmp_path):
    coin.fail = {("b", 1)}
    finished = run_study(coin, options(tmp_path), Quiet())
    assert finished.verdicts[0].status == "inconclusive"
    failed = [cell for cell in finished.result.cells if cell.status == "failed"]
    assert [(cell.arm, cell.seed) for cell in failed] == [("b", 1)]
    assert "planted" in failed[0].error
    assert "planted" in (tmp_path / "report.md").read_text()
    coin.runs.clear()
    run_study(coin, options(tmp_path), Quiet())
    assert coin.runs == []


def test_an_interrupt_keeps_finished_cells_and_releases_leases(coin, tmp_path):
    coin.fail, coin.raises = {("b", 1)}, KeyboardInterrupt
    with pytest.raises(InterruptedRun, match="same command continues"):
        run_study(coin, options(tmp_path), Quiet())
    done = len(coin.runs) - 1
    coin.fail = set()
    coin.runs.clear()
    finished = run_study(coin, options(tmp_path), Quiet())
    assert len(coin.runs) == 6 - done
    assert finished.verdicts[0].status == "holds"


def test_a_damaged_cell_is_named(coin, tmp_path):
    run_study(coin, options(tmp_path), Quiet())
    path = tmp_path / "cells" / "a" / "seed-0" / "cell.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(StudyError, match=r"cell\.json is damaged"):
        run_study(coin, options(tmp_path), Quiet())


def test_two_runners_on_one_directory_share_the_cells(coin, tmp_path):
    results = []

    def work():
        results.append(run_study(coin, options(tmp_path), Quiet()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    run_study(coin, options(tmp_path, seeds=1), Quiet())  # the preparation is done before both start
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert sorted(coin.runs) == [(arm, seed) for arm in "ab" for seed in range(3)]


def test_two_runners_that_start_at_once_prepare_once(coin, tmp_path):
    """Preparation measures, so two answers could differ, and the cells of one would be refused by the other."""
    barrier, slow = threading.Barrier(2), coin.prepare

    def prepare(arms, settings, directory):
        time.sleep(0.3)
        return slow(arms, settings, directory)

    coin.prepare = prepare

    def work():
        barrier.wait()
        run_study(coin, options(tmp_path), Quiet())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert coin.prepared == 1
    assert sorted(coin.runs) == [(arm, seed) for arm in "ab" for seed in range(3)]


def test_sequential_seeds_stop_when_decided(coin, tmp_path):
    finished = run_study(coin, options(tmp_path / "clear", max_seeds=12), Quiet())
    assert finished.verdicts[0].status == "holds"
    assert max(seed for _, seed in coin.runs) == 2
    coin.runs.clear()
    finished = run_study(coin, options(tmp_path / "noise", scale="noise", max_seeds=5), Quiet())
    assert max(seed for _, seed in coin.runs) == 4
    assert [look["n"] for look in finished.verdicts[0].looks] == [3, 5]
    assert "group-sequential" in finished.result.design


def test_a_metric_that_is_not_finite_fails_the_cell(coin, tmp_path, monkeypatch):
    monkeypatch.setattr(Coin, "measure", lambda self, cell: Measurement({"loss": float("nan")}))
    finished = run_study(coin, options(tmp_path), Quiet())
    assert {cell.status for cell in finished.result.cells} == {"failed"}


def test_claims_about_unknown_arms_are_refused_before_anything_runs(coin, tmp_path, monkeypatch):
    monkeypatch.setattr(Coin, "claims", (Claim(id="c", sentence="", metric="loss", arm="z", baseline="a"),))
    with pytest.raises(StudyError, match="claim 'c' speaks of z"):
        StudyRun(coin, options(tmp_path), Quiet())


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x" * 300])
def test_hostile_arm_names_are_refused(coin, tmp_path, monkeypatch, name):
    monkeypatch.setattr(Coin, "arms", lambda self, scale: [Arm("a", "baseline"), Arm("b"), Arm(name)])
    with pytest.raises(ValueError, match="arm name"):
        run_study(coin, options(tmp_path), Quiet())


def test_plain_progress_names_every_cell(coin, tmp_path, capsys):
    run_study(coin, options(tmp_path), Lines())
    lines = capsys.readouterr().err
    assert "Coins: 6 cells" in lines
    assert "6/6 b seed 2 done" in lines


@pytest.mark.parametrize(("raised", "code"), [(DataError("notes.jsonl:3: no JSON"), 3), (ValueError("odd"), 2)])
def test_an_error_of_the_preparation_keeps_its_kind(coin, tmp_path, monkeypatch, raised, code):
    def fail(*arguments):
        raise raised

    monkeypatch.setattr(coin, "prepare", fail)
    with pytest.raises(TorchstoneError, match=str(raised)) as caught:
        run_study(coin, options(tmp_path), Quiet())
    assert caught.value.exit_code == code


def test_claims_about_items_are_not_decided_sequentially(coin, tmp_path, monkeypatch):
    claim = Claim(id="c", sentence="", metric="loss", arm="b", baseline="a", unit="items")
    monkeypatch.setattr(Coin, "claims", (claim,))
    with pytest.raises(StudyError, match="without --until-decided"):
        run_study(coin, options(tmp_path, max_seeds=9), Quiet())


def test_a_passing_failure_is_not_kept(coin, tmp_path):
    coin.fail, coin.raises = {("b", 1)}, OSError
    assert run_study(coin, options(tmp_path), Quiet()).verdicts[0].status == "inconclusive"
    coin.fail = set()
    coin.runs.clear()
    assert run_study(coin, options(tmp_path), Quiet()).verdicts[0].status == "holds"
    assert coin.runs == [("b", 1)]
