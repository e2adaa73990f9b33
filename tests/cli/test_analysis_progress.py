"""Progress of analyses: what is counted and shown, and that nothing else changes."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable

import pytest
import torch
from subjects import byte_subject, texts

from torchstone.cli import analysis_progress
from torchstone.cli.analysis_progress import AnalysisProgress
from torchstone.diagnose.ranks.attention_rank import attention_rank_finding
from torchstone.diagnose.rotary.rope_usage import rope_usage_finding

TOKENS = torch.arange(40).view(2, 20)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def wait_for(words: str, read: Callable[[], str]) -> str:
    until, seen = time.monotonic() + 10, ""
    while words not in seen and time.monotonic() < until:
        time.sleep(0.01)
        seen += read()
    return seen


def test_passes_and_layers_are_counted_in_controls_too() -> None:
    progress, subject = AnalysisProgress("look"), byte_subject()
    assert "passes" not in progress.line()
    progress.follow(subject)
    subject.losses(TOKENS)
    assert re.fullmatch(r"look: \d+ s, 1 passes of the model", progress.line())
    places = []
    subject.visit(TOKENS, lambda layer, activations: places.append(progress.line().rpartition(", ")[2]))
    assert places == ["layer 1 of 2", "layer 2 of 2"]
    control = subject.untrained(1)
    assert progress.line().endswith("making the untrained control")
    control.hidden_states(TOKENS)
    assert progress.line().endswith("3 passes of the model")
    control.layers[0].weights()
    assert progress.line().endswith("layer 1 of 2")


def test_numbers_stay_the_same() -> None:
    for finding in (lambda subject: rope_usage_finding(subject, texts(), length=16, count=2), attention_rank_finding):
        plain, followed = byte_subject(), byte_subject()
        with AnalysisProgress("x") as progress:
            progress.follow(followed)
            assert finding(followed) == finding(plain)


def test_elsewhere_than_on_a_terminal_there_are_few_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with AnalysisProgress("short"):
        pass
    assert capsys.readouterr().err == "" and analysis_progress.PLAIN_SECONDS == 5.0
    monkeypatch.setattr(analysis_progress, "PLAIN_SECONDS", 0.02)
    with AnalysisProgress("long") as progress:
        progress.passes = 7
        seen = wait_for("7 passes", lambda: capsys.readouterr().err)
    assert "long: 0 s, 7 passes of the model\n" in seen
    time.sleep(0.1)
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_line_that_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with AnalysisProgress("look [/A]") as progress:
        progress.passes = 7
        seen = wait_for("7 passes", terminal.getvalue)
    assert "look [/A]: " in seen and "7 passes of the model" in seen
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue()  # the cursor is back
