"""`torchstone allocate TABLE --budget N`: split a sampling budget over configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from torchstone.llm.allocation.summary import BudgetRow, Summary
    from torchstone.stats.estimate import Estimate


def allocate(
    table: Annotated[Path, typer.Argument(help="CSV of counts, or JSONL log of samples.")],
    budget: Annotated[float, typer.Option(help="Samples per problem; with --cost, total cost per problem.")],
    split: Annotated[
        str | None,
        typer.Option(help="Column with train/test, kfold:K or half. Default: column `split` if any, else kfold:5."),
    ] = None,
    cost: Annotated[
        Path | None, typer.Option(help="JSON object: configuration -> cost of one sample. Default: 1 each.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto, greedy, greedy+swap, exact or hill_climb (the authors').")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random splits and bootstrap resamples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for the answer as CSV and JSON files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Split a sampling budget over configurations (OSCA), and say what that is worth on held-out problems.

    TABLE has a column `problem`, one column per configuration with the number of successes, and a row `runs`
    with the number of trials; or cells successes/trials; or it is a JSONL log with problem, configuration and
    correct on every line.
    """
    from rich.console import Console

    from torchstone.llm.allocation.files import write_summary
    from torchstone.llm.allocation.summary import Request, split_column, summarise
    from torchstone.llm.allocation.table import read_cost, read_table
    from torchstone.storage.names import safe_text

    counts = read_table(table, split_column(split))
    prices = read_cost(cost, counts.configurations) if cost is not None else None
    summary = summarise(counts, Request(budget, prices, method, split, seed))  # type: ignore[arg-type]
    for warning in summary.warnings:
        typer.echo(f"warning: {safe_text(warning)}", err=True)
    if as_json:
        typer.echo(json.dumps(summary.as_json(), allow_nan=False))
    else:
        _print(summary, Console())
    if out is not None:
        written = write_summary(summary, out)
        typer.echo(f"Wrote {', '.join(path.name for path in written)} in {safe_text(str(out))}", err=as_json)


def _print(summary: Summary, console: Console) -> None:
    from rich.text import Text

    from torchstone.storage.names import safe_text

    found = summary.allocation
    names = [Text(" ".join(safe_text(name).split())) for name in found.configurations]
    chosen = _table(f"Allocation of a budget of {found.budget:g}", ["configuration", "samples", "cost"])
    for name, count, price in zip(names, found.counts, found.cost, strict=True):
        if count:
            chosen.add_row(name, str(count), f"{count * price:g}")
    console.print(chosen)
    console.print(
        f"Method {found.method}: within {found.gap:.2g} of the best possible split on fitted problems "
        f"(train value {found.train_value:.4f}, optimistic). Drawn in order until the first success, "
        f"{found.expected_samples:.1f} samples per problem on average.\n"
    )
    headings = ["budget", "solved", "95 %", "single", "uniform", "gain", "95 %", "gap"]
    curve = _table(f"Share of held-out problems solved; {summary.tested}", headings)
    for row in summary.rows:
        curve.add_row(*_cells(row))
    console.print(curve)
    console.print(
        "single: all samples on the configuration that is best on the fitted problems; gain: solved - single, "
        "paired by problem; gap: distance from the best split, at most.\n"
    )
    numbers = [str(index + 1) for index in range(len(names))]
    adds = _table("Problems that the column solved at least once, the row never", ["", *numbers])
    for number, name, counts in zip(numbers, names, summary.adds, strict=True):
        adds.add_row(Text(f"{number} ").append(name), *map(str, counts))
    console.print(adds)
    console.print("Diagonal: problems solved at all.")


def _table(title: str, headings: list[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for index, heading in enumerate(headings):
        textual = index == 0 and heading != "budget"
        table.add_column(heading, justify="left" if textual else "right", no_wrap=True, overflow="fold")
    return table


def _cells(row: BudgetRow) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    def interval(estimate: Estimate | None) -> str:
        if estimate is None or estimate.low is None or estimate.high is None:
            return "-"
        return f"[{estimate.low:.3f}, {estimate.high:.3f}]"

    return [
        f"{row.budget:g}",
        number(row.mixed.value),
        interval(row.interval),
        number(row.pure.value if row.pure else None),
        number(row.uniform.value if row.uniform else None),
        number(row.gain.effect if row.gain else None),
        interval(row.gain),
        f"{row.gap:.0e}",
    ]
