"""Verdicts for the command line: a table on a terminal, plain lines in a pipe or a log.

Names and sentences lose control and direction characters first, so a hostile name can neither move the cursor
nor reorder a line; they are passed as text, never as rich's markup.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchstone.report import words
from torchstone.report.result import Result, Verdict
from torchstone.storage.names import safe_text

STYLES = {"holds": "bold green", "fails": "bold red", "inconclusive": "bold yellow"}


def print_verdicts(result: Result, directory: Path | None = None, console: Console | None = None) -> None:
    """Print title, verdicts, the summary line and where the report lies, on standard output by default."""
    console = console or Console()
    rich = console.is_terminal and console.encoding.lower().startswith("utf")
    if rich and result.verdicts:
        console.print(_one_line(result.title), style="bold")
        console.print(_table(result))
        lines = [words.summary(result)]
    else:
        lines = [
            result.title,
            *(_plain(verdict, result) for verdict in result.verdicts),
            words.summary(result),
        ]
    if directory is not None:
        lines.append(f"report: {Path(directory) / 'report.html'}")
    for line in lines:
        shown = _line(line).encode(console.encoding, "replace").decode(console.encoding)
        console.print(Text(shown), soft_wrap=not rich)


def _line(text: str) -> str:
    return safe_text(" ".join(text.split()))


def _one_line(text: str) -> Text:
    return Text(_line(text))


def _plain(verdict: Verdict, result: Result) -> str:
    scale = words.scale_for([verdict], result.metrics)
    parts = [
        f"{verdict.status.upper()}: {verdict.sentence}",
        words.effect_sentence(verdict, result.metrics, scale),
        f"claimed {words.claimed(verdict, scale)}",
        words.reason(verdict),
    ]
    return _line("  |  ".join(part for part in parts if part))


def _table(result: Result) -> Table:
    table = Table(show_lines=True)
    for heading, justify in (
        ("verdict", "left"),
        ("claim", "left"),
        ("effect", "right"),
        ("claimed", "right"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("n", justify="right")
    for verdict in result.verdicts:
        scale = words.scale_for([verdict], result.metrics)
        claim = _one_line(verdict.sentence)
        if verdict.reason:
            claim.append(f"\n{_line(words.reason(verdict))}", style="dim")
        effect = Text(_line(scale.text(verdict.effect)), style="bold")
        if verdict.interval is not None:
            effect.append(f"\n{_line(words.interval_text(verdict, scale))}", style="not bold")
        badge = Text(f"{words.ICONS[verdict.status]} {verdict.status}", style=STYLES[verdict.status])
        table.add_row(badge, claim, effect, _one_line(words.claimed(verdict, scale)), _one_line(words.counted(verdict)))
    return table
