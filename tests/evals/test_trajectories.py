"""Categories of tokens against polyfit and the rule read aloud; the finding over a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchstone.diagnose.adapters import open_subject
from torchstone.errors import ConfigError, DataError
from torchstone.evals.trajectories import CATEGORIES, categorise, shares_so_far, without_change
from torchstone.evals.trajectories_finding import _piece, trajectories_finding
from torchstone.report.finding_write import write
from torchstone.train.run import train


@given(seed=st.integers(0, 200), count=st.integers(2, 16), threshold=st.sampled_from([0.0, 0.2, 1.0]))
def test_lines_and_categories_are_those_of_the_rule(seed: int, count: int, threshold: float) -> None:
    losses = np.random.default_rng(seed).gamma(2.0, 1.0, (40, count)).astype(np.float32)
    found = categorise(losses, threshold)
    mean_last = losses[:, -1].astype(float).mean()
    assert found.mean_last == pytest.approx(mean_last, rel=1e-12)
    for i, row in enumerate(losses.astype(float)):
        slope, start = np.polyfit(np.arange(count), row, 1)
        end = start + slope * (count - 1)
        assert found.fit_start_n[i] == pytest.approx(start, abs=1e-9)
        assert found.fit_end_n[i] == pytest.approx(end, abs=1e-9)
        if abs(abs(end - start) - threshold) < 1e-9:
            continue
        if end - start < -threshold:
            expected = "H>L"
        elif end - start > threshold:
            expected = "L>H"
        else:
            expected = "L>L" if row[-1] <= mean_last else "H>H"
        assert found.category_n[i] == expected
    assert sum(found.shares().values()) == pytest.approx(1)


def test_four_clear_cases() -> None:
    steps = np.arange(5)
    losses = np.stack([4 - 0.8 * steps, 0.5 + 0.5 * steps, np.full(5, 3.0), np.full(5, 0.1)])
    assert categorise(losses).category_n.tolist() == ["H>L", "L>H", "H>H", "L>L"]
    assert categorise(losses, threshold=10).shares()["H>L"] == 0
    assert [one["H>L"] for one in shares_so_far(losses)] == [0.25] * 3


def test_straight_noiseless_lines_leave_nothing_in_the_control() -> None:
    slopes = np.random.default_rng(0).normal(0, 3, 500)
    losses = 9 + slopes[:, None] * np.linspace(0, 1, 6)
    assert categorise(losses).shares()["H>L"] > 0.4
    control = without_change(losses)
    assert categorise(control).delta_n == pytest.approx(0, abs=1e-12)
    shares = categorise(control).shares()
    assert shares["H>L"] == shares["L>H"] == 0


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_control_errs_as_often_as_the_rule_does_on_noise_alone(count: int) -> None:
    draw = np.random.default_rng(1)
    noise = draw.normal(0, 0.15, (20_000, count))
    expected = categorise(3 + noise).shares()
    learning = 3 - 2 * draw.random(20_000)[:, None] * np.linspace(0, 1, count) + noise
    found = categorise(without_change(learning)).shares()
    assert expected["H>L"] + expected["L>H"] > 0.05
    for name in ("H>L", "L>H"):
        assert found[name] == pytest.approx(expected[name], abs=0.12 if count == 3 else 0.03)


def test_the_control_needs_three_checkpoints() -> None:
    with pytest.raises(ConfigError, match="2 checkpoints were given"):
        without_change(np.zeros((3, 2)))


def test_at_the_threshold_and_at_the_mean_nothing_has_changed_and_all_is_known() -> None:
    losses = np.asarray([[1.0, 1.25], [2.0, 1.75], [1.5, 1.5]])
    assert categorise(losses, threshold=0.25).category_n.tolist() == ["L>L", "H>H", "L>L"]


@pytest.mark.parametrize(
    ("losses", "threshold", "words"),
    [
        (np.zeros((3, 1)), 0.2, "at least 2 checkpoints"),
        (np.zeros(3), 0.2, r"shape \(3,\)"),
        (np.zeros((3, 4)), -0.1, "threshold is -0.1"),
        (np.zeros((3, 4)), float("nan"), "threshold is nan"),
    ],
)
def test_bad_settings_are_refused(losses: Any, threshold: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        categorise(losses, threshold)


def test_bad_losses_are_refused_by_place() -> None:
    losses = np.zeros((3, 4))
    losses[2, 1] = np.nan
    with pytest.raises(DataError, match="token 2 at checkpoint 1 is nan"):
        categorise(losses)
    with pytest.raises(DataError, match="no token"):
        categorise(np.zeros((0, 4)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_recipe: Any) -> Path:
    path = tmp_path_factory.mktemp("trajectories") / "run"
    train(text_recipe(steps=12, every=3, keep=4), path, progress=lambda state: None)
    return path


def test_the_finding_of_a_run(run: Path, tmp_path: Path) -> None:
    subject = open_subject(run)
    finding = trajectories_finding(subject, sequences=8, threshold=0.05, directory=tmp_path)
    shares, steps = finding.tables
    assert [row[0] for row in shares.rows] == list(CATEGORIES)
    assert sum(int(row[2] or 0) for row in shares.rows) == 8 * 32
    assert sum(float(row[3] or 0) for row in shares.rows) == pytest.approx(1)
    assert [row[0] for row in steps.rows] == [3, 6, 9, 12]
    stacked = finding.figures[0]
    assert stacked.lines[-1].y == pytest.approx((1.0, 1.0)) and [len(line.y) for line in stacked.lines] == [2] * 4
    for text in finding.token_texts:
        assert any(span.marked and span.value is not None for span in text.spans)
    assert "residuals about its fitted line" in finding.control and "12" in finding.notes[1]
    kept = sorted((tmp_path / "losses").iterdir())
    assert len(kept) == 4
    before = [path.stat().st_mtime_ns for path in kept]
    again = trajectories_finding(subject, sequences=8, threshold=0.05, directory=tmp_path)
    assert again == finding and [path.stat().st_mtime_ns for path in kept] == before
    kept[1].write_bytes(b"damaged")
    assert trajectories_finding(subject, sequences=8, threshold=0.05, directory=tmp_path) == finding
    assert write(finding, tmp_path / "report").stat().st_size < 2_000_000


def test_bytes_of_one_character_are_shown_as_that_character(run: Path) -> None:
    subject = open_subject(run)
    ids = subject.encode("a Ü€ b")
    targets = torch.tensor(ids)
    deltas = np.asarray([0.1, 0.2, 0.3, -0.9, 0.0, 0.5, np.nan, 0.1, 0.2])[: len(ids)]
    marked = np.asarray([False, False, False, True, False, False, False, False, False])[: len(ids)]
    spans = _piece(subject, targets, targets, deltas, marked, 3)
    assert [span.text for span in spans] == ["a", " ", "Ü", "€", " ", "b"]
    assert (spans[2].value, spans[2].marked) == (-0.9, True) and (spans[3].value, spans[3].marked) == (0.5, False)


def test_categories_have_one_colour_in_both_figures(run: Path, tmp_path: Path) -> None:
    finding = trajectories_finding(open_subject(run), sequences=8, threshold=50.0)
    stacked, means = finding.figures
    assert [line.name for line in stacked.lines] == [line.name for line in means.lines]
    assert any(set(line.y) == {None} for line in means.lines)
    assert "H>L 0.0 %" in stacked.note
    write(finding, tmp_path)


def test_losses_of_the_last_checkpoint_are_those_of_the_run(run: Path) -> None:
    finding = trajectories_finding(open_subject(run), steps=(3, 9, 12), sequences=8)
    from torchstone.train.events import read_history

    history, _ = read_history(run)
    assert finding.tables[1].rows[-1][-1] == pytest.approx(history["validation"]["loss"][-1], abs=1e-5)


def test_text_files_in_place_of_held_out_sequences(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Some words of my own, again and again. " * 30)
    finding = trajectories_finding(open_subject(run), files=(str(path),), sequences=4)
    assert sum(int(row[2] or 0) for row in finding.tables[0].rows) == 4 * 32


def test_what_cannot_be_sorted_is_refused(run: Path, tmp_path: Path, text_recipe: Any) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of step 5; its steps are 3, 6, 9, 12"):
        trajectories_finding(open_subject(run), steps=(3, 5, 9))
    with pytest.raises(ConfigError, match="at least 3 checkpoints, and 2 are there.*checkpoint.keep=10"):
        trajectories_finding(open_subject(run), steps=(3, 9))
    with pytest.raises(ConfigError, match="sequences is 0"):
        trajectories_finding(open_subject(run), sequences=0)
    with pytest.raises(ConfigError, match="examples is -1"):
        trajectories_finding(open_subject(run), examples=-1)
    with pytest.raises(ConfigError, match=r"was opened \(--step\).*--steps"):
        trajectories_finding(open_subject(run, step=6))
    short = tmp_path / "short"
    train(text_recipe(steps=2, every=None, keep=2), short, progress=lambda state: None)
    with pytest.raises(ConfigError, match=r"1 are there \(2\).*checkpoint.every"):
        trajectories_finding(open_subject(short))
    subject = open_subject(run)
    subject.name = "a hub model"
    with pytest.raises(ConfigError, match="is no run directory"):
        trajectories_finding(subject)
