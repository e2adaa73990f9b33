"""Progress: plain lines off a terminal, a bar on one, nothing that markup or control characters could spoil."""

from __future__ import annotations

import io
import sys

import pytest

from torchstone.train import progress
from torchstone.train.progress import TrainingProgress


def state(step: int, speed: float = 1000.0) -> dict[str, float]:
    return {"step": step, "steps": 10, "loss": 1.25, "tokens_per_second": speed, "tokens_per_step": 100}


class Terminal(io.StringIO):
    """Standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_line_now_and_then_and_one_at_the_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = TrainingProgress("run")
    for step in range(1, 11):
        now[0] += 4.0
        shown(state(step))
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3/10", "step 6/10", "step 9/10", "step 10/10"]
    assert lines[0] == "step 3/10  loss 1.2500  1,000 tokens/s  ETA 1 s"
    assert lines[-1].endswith("ETA 0 s")


def test_the_speed_is_smoothed(capsys):
    shown = TrainingProgress("run")
    shown(state(1, 1000.0))
    shown(state(10, 2000.0))
    assert "1,100 tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize("title", ["run", "[red]run[/nothing]"])
def test_a_bar_on_a_terminal(monkeypatch, title):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    shown = TrainingProgress(title)
    for step in (1, 10):
        shown(state(step))
    shown.close()
    text = terminal.getvalue()
    assert title in text and "10/10" in text and "loss 1.2500" in text
