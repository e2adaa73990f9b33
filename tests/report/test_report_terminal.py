"""Terminal output: a table on a terminal, plain lines elsewhere, no control characters from data."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import ModuleType

from rich.console import Console

from torchstone.report.result import Result
from torchstone.report.terminal import print_verdicts


def printed(result: Result, terminal: bool, width: int = 120) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, color_system="standard" if terminal else None)
    print_verdicts(result, Path("runs/x"), console)
    return stream.getvalue()


def test_plain_lines_for_pipes(results: ModuleType) -> None:
    text = printed(results.study(), terminal=False)
    lines = text.splitlines()
    assert lines[1].startswith("HOLDS: Differential attention") and "nats" in lines[1]
    assert lines[2].startswith("INCONCLUSIVE: ") and lines[3].startswith("FAILS: ")
    assert lines[-1] == "report: runs/x/report.html"
    assert text.isprintable() or "\x1b" not in text


def test_a_table_on_a_terminal(results: ModuleType) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", printed(results.study(), terminal=True))
    assert "✓ holds" in text and "✗ fails" in text and "? inconclusive" in text and "3 seeds" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_nothing_to_show_still_says_so(results: ModuleType) -> None:
    for terminal in (False, True):
        assert "No claim was tested" in printed(results.comparison(), terminal)


def test_a_stream_that_cannot_write_every_character_gets_question_marks(results: ModuleType) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_verdicts(results.algorithm(), None, Console(file=stream, force_terminal=True))
    stream.flush()
    assert b"INCONCLUSIVE" in stream.buffer.getvalue() and b"?1.82" in stream.buffer.getvalue()
