"""Writing, reading back, and making reports again."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from torchstone import report
from torchstone.cli.report import report as verb
from torchstone.errors import StudyError


def test_three_files_and_the_same_result_back(results: ModuleType, tmp_path: Path) -> None:
    result = results.study()
    path = report.write(result, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "report.html",
        "report.md",
        "result.json",
    ]
    assert report.load(path.parent) == result == report.load(path.parent / "result.json")


@pytest.mark.parametrize("name", ["hostile", "algorithm", "nothing"])
def test_every_result_survives_the_file(results: ModuleType, tmp_path: Path, name: str) -> None:
    result = results.BUILDERS[name]()
    report.write(result, tmp_path)
    assert report.load(tmp_path) == result


def test_render_makes_the_same_reports_and_leaves_the_truth_alone(results: ModuleType, tmp_path: Path) -> None:
    report.write(results.study(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("result.json", "report.html", "report.md")}
    stamp = (tmp_path / "result.json").stat().st_mtime_ns
    (tmp_path / "report.html").unlink()
    report.render(report.load(tmp_path), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert (tmp_path / "result.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b'{"title": "half', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"[]", "not a result"),
        (b'{"title": 3}', "not a result"),
        (b'{"schema_version": 99, "title": "x"}', "schema version 99"),
    ],
)
def test_damage_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(StudyError, match=message):
        report.load(tmp_path)


def test_numbers_that_are_not_finite_are_refused(results: ModuleType, tmp_path: Path) -> None:
    report.write(results.study(), tmp_path)
    data = json.loads((tmp_path / "result.json").read_text())
    data["verdicts"][0]["effect"] = float("nan")
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(StudyError, match=r"verdicts\.0\.effect"):
        report.load(tmp_path)


def test_a_directory_without_result_is_said(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"holds no result\.json"):
        report.load(tmp_path)


def test_the_verb_makes_reports_again(results: ModuleType, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(verb)
    report.write(results.study(), tmp_path)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.md").unlink()
    outcome = CliRunner().invoke(app, [str(tmp_path)])
    assert outcome.exit_code == 0 and "HOLDS" in outcome.output
    assert (tmp_path / "report.html").is_file() and (tmp_path / "report.md").is_file()
    missing = CliRunner().invoke(app, [str(tmp_path / "nowhere")])
    assert isinstance(missing.exception, StudyError)


def test_vendored_files_are_those_that_their_note_names() -> None:
    folder = files("torchstone.report") / "vendor"
    rows = re.findall(r"\| `([^`]+)` \| (\d+) \| `([0-9a-f]{64})` \|", (folder / "README.md").read_text())
    assert {name for name, _, _ in rows} == {"uPlot.iife.min.js", "uPlot.min.css"}
    for name, size, digest in rows:
        content = (folder / name).read_bytes()
        assert len(content) == int(size) and hashlib.sha256(content).hexdigest() == digest
    assert "MIT License" in (folder / "uPlot.LICENSE").read_text()
