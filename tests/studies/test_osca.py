"""The allocation study: smoke run, published digits, controls, generated data where the table is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchstone.data.published import SOURCES, notice, published
from torchstone.errors import DataError
from torchstone.lab.runnable import Runnable
from torchstone.report.result import Result
from torchstone.studies import _osca
from torchstone.studies.osca import MIXED, PURE, QUESTIONS, Osca

needs_table = pytest.mark.skipif(published(_osca.DATA) is None, reason=notice(_osca.DATA))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return Runnable(Osca()).run("smoke", out=tmp_path_factory.mktemp("osca"), on="inline").result


def test_every_cell_and_claim_is_there(result: Result) -> None:
    assert len(result.cells) == 8 and {cell.status for cell in result.cells} == {"done"}
    assert [verdict.claim for verdict in result.verdicts] == [claim.id for claim in Osca.claims]
    assert all(verdict.unit_of_n == "items" for verdict in result.verdicts)
    assert {verdict.n for verdict in result.verdicts} == {148}
    assert set(result.cells[0].metrics) == {question.metric for question in QUESTIONS}


def test_controls_behave(result: Result) -> None:
    status = {verdict.claim: verdict.status for verdict in result.verdicts}
    assert status["control-planted"] == "holds"
    assert status["control-dominated"] != "holds"
    assert status["control-in-sample"] == "holds"


def test_certificates_and_curves_are_shown(result: Result) -> None:
    titles = [table.title for table in result.tables]
    assert "Certificate of the fits" in titles
    gaps = next(table for table in result.tables if table.title == "Certificate of the fits")
    assert len(gaps.rows) == len(QUESTIONS) and all(0 <= row[1] <= row[2] < 0.02 for row in gaps.rows)
    assert {line.name for line in result.figures[0].lines} == {PURE, MIXED, "uniform mixed", "oracle pure"}


@needs_table
def test_published_digits() -> None:
    table = _osca.authors_split(_osca.population("main", True), printed=True)
    for row, mixed, pure, uniform in zip(table.rows, *_osca.PRINTED.values(), strict=True):
        assert row[1] == mixed and row[3] == pure
        assert row[5] == pytest.approx(uniform, abs=0.005)  # the printed one is a mean of 200 draws


@needs_table
def test_compute_saved_on_the_published_split() -> None:
    saved = _osca.compute_saved(_osca.population("main", True))
    assert saved[0].ours == "97 samples suffice: 2.6x" and "Llama_1.4" in saved[0].setting
    assert saved[1].ours == "5 samples suffice: 51.2x" and "Qwen_0.5" in saved[1].setting


def test_generated_arm_without_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSTONE_DATA", str(tmp_path / "nowhere"))
    result = Runnable(Osca()).run("smoke", out=tmp_path / "run", on="inline").result
    note = " ".join(result.notes)
    source = SOURCES[_osca.DATA]
    assert "GENERATED DATA" in note
    assert source.repository in note and source.file in note and source.sha256 in note
    assert result.tables[0].columns[:3] == ("samples", "OSCA", "train-selected pure")
    assert next(v for v in result.verdicts if v.claim == "mixed-16").status == "holds"


def test_published_looks_in_the_given_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHSTONE_DATA", str(tmp_path))
    assert published(_osca.DATA) is None
    (tmp_path / "osca").mkdir()
    (tmp_path / _osca.DATA).write_text("x")
    assert published(_osca.DATA) == tmp_path / _osca.DATA
    with pytest.raises(DataError, match="not a known published file"):
        published("../secrets.csv")


def test_the_study_file_is_short() -> None:
    assert len(Path(__file__).parents[2].joinpath("src/torchstone/studies/osca.py").read_text().splitlines()) <= 150
