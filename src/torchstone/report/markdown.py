"""The Markdown report: the same content as the page without its charts, for pull requests and terminals.

Everything from outside is escaped: pipes and line breaks would break a table, angle brackets and ampersands
would be HTML, and the marks of emphasis, links and images would change what a name says. Code blocks get a
fence longer than any run of backticks inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torchstone.report import numbers, tables, words
from torchstone.report.markup import clean
from torchstone.report.result import ArmRecord, Result, Verdict
from torchstone.report.sections.arms import POLICIES, QUANTITIES, shown_value
from torchstone.report.tables import Grid

MOST_ERRORS = 20
ERROR_LENGTH = 3000


def escape(text: str) -> str:
    """`text` as one line of Markdown text that shows exactly these characters."""
    line = " ".join(clean(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~!#])", r"\\\1", line)
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    return re.sub(r"^([-+=]+)(?=\s|$)", r"\\\1", line)


def code(text: str) -> str:
    """`text` as inline code; pipes are escaped for tables."""
    line = " ".join(clean(text).split()) or " "
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{ticks}{pad}{line}{pad}{ticks}".replace("|", "\\|")


def block(text: str, language: str = "") -> str:
    """`text` as a code block."""
    inside = clean(text).rstrip("\n")
    fence = "`" * max(3, _longest_run(inside) + 1)
    return f"{fence}{language}\n{inside}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


def grid(table: Grid) -> str:
    """A table."""
    marks = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [_row(escape(column) for column in table.columns), _row(marks)]
    lines += [_row(escape(value) for value in row) for row in table.rows]
    cut = f"\n\n{table.cut:,} more rows are in `result.json`." if table.cut else ""
    return "\n".join(lines) + cut


def _row(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def page(result: Result) -> str:
    """The whole report as Markdown."""
    parts = [
        f"# {escape(result.title)}",
        escape(result.question),
        f"**{escape(words.summary(result))}**",
        _verdicts(result),
        _arms(result),
        _part("Measurements", tables.measurements(result)),
        *_study_tables(result),
        _paper(result),
        _part("Costs", tables.costs(result)),
        _failures(result),
        _about(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _part(heading: str, table: Grid | None) -> str:
    return f"## {heading}\n\n{grid(table)}" if table else ""


def _verdicts(result: Result) -> str:
    if not result.verdicts:
        return ""
    columns = (
        "verdict",
        "claim",
        "effect",
        "interval",
        "claimed",
        "n",
        "detectable past the margin (designed; observed)",
        "reason",
    )
    rows = tuple(_verdict(verdict, result) for verdict in result.verdicts)
    return f"## Verdicts\n\n{grid(Grid(columns, rows, (False,) * 8))}\n\n{words.LEGEND}"


def _verdict(verdict: Verdict, result: Result) -> tuple[str, ...]:
    scale = words.scale_for([verdict], result.metrics)
    reason = words.reason(verdict)
    if verdict.n_needed is not None:
        reason = f"{reason} About {verdict.n_needed:,} {verdict.unit_of_n} would decide it.".strip()
    return (
        f"{words.ICONS[verdict.status]} {verdict.status}",
        f"{verdict.sentence} ({words.contrast_words(verdict, result.metrics)})",
        scale.text(verdict.effect),
        words.interval_text(verdict, scale),
        words.claimed(verdict, scale),
        words.counted(verdict),
        f"{scale.detectable(verdict.mde_before)}; {scale.detectable(verdict.mde_after)}",
        reason,
    )


def _arms(result: Result) -> str:
    if not result.arms:
        return ""
    return "## Arms\n\n" + "\n".join(_arm(arm, result) for arm in result.arms)


def _arm(arm: ArmRecord, result: Result) -> str:
    role = "baseline" if arm.name == result.baseline else arm.role
    line = f"- **{escape(arm.name)}** ({role})"
    if arm.note:
        line += f": {escape(arm.note)}"
    lines = [line]
    for change in arm.intervention:
        before, after = code(shown_value(change.baseline)), code(shown_value(change.value))
        lines.append(f"  - {code(change.path)}: {before} → {after}")
    if arm.match is not None:
        match = arm.match
        free = f" through {code(match.free)} {code(shown_value(match.before))} → {code(shown_value(match.after))}"
        how = free if match.after is not None else ", as it is"
        residual = numbers.percent(match.residual, 2)
        lines.append(f"  - matched on {QUANTITIES[match.on]}{how}, residual {residual}")
    if arm.learning_rate is not None:
        policy = POLICIES[arm.learning_rate_policy]
        lines.append(f"  - learning rate {arm.learning_rate:g}" + (f", {policy}" if policy else ""))
    return "\n".join(lines)


def _study_tables(result: Result) -> list[str]:
    parts = []
    for table in result.tables:
        note = f"\n\n{escape(table.note)}" if table.note else ""
        parts.append(f"## {escape(table.title)}\n\n{grid(tables.of_table(table))}{note}")
    return parts


def _paper(result: Result) -> str:
    if not result.paper:
        return ""
    rows = tuple((figure.setting, figure.paper or "–", figure.ours or "–", figure.note) for figure in result.paper)
    return _part("The paper's figures beside ours", Grid(("setting", "paper", "ours", "note"), rows, (False,) * 4))


def _failures(result: Result) -> str:
    failures = tables.failures(result)
    if not failures:
        return ""
    parts = [f"### {escape(who)}\n\n{block(error[-ERROR_LENGTH:])}" for who, error in failures[:MOST_ERRORS]]
    if len(failures) > MOST_ERRORS:
        parts.append(f"{len(failures) - MOST_ERRORS} more errors are in `result.json`.")
    return "\n\n".join(["## Failed and missing cells", *parts])


def _about(result: Result) -> str:
    lines = ["## About this result"]
    if result.design:
        lines.append(escape(result.design))
    if result.notes:
        lines.append("\n".join(f"- {escape(note)}" for note in result.notes))
    if result.command:
        lines.append(block(result.command, "sh"))
    lines.append(f"Made {escape(result.created)}; fingerprint {code(result.fingerprint)}.")
    if result.environment:
        lines.append("; ".join(f"{escape(name)} {escape(value)}" for name, value in result.environment.items()))
    if result.recipe_yaml:
        lines.append(f"<details><summary>Recipe</summary>\n\n{block(result.recipe_yaml, 'yaml')}\n\n</details>")
    return "\n\n".join(lines)
