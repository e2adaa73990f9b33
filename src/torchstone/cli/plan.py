"""`torchstone plan RECIPE`: phases, served budgets and checkpoints of a recipe before it runs, with a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from torchstone.train.plan import RunPlan

Row = TypeVar("Row")
MOST_ROWS, LAST_ROWS = 40, 5  # printed of each table, and how many of them are its last


def plan(
    file: Annotated[Path, typer.Argument(help="Recipe (YAML).", metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides.", metavar="KEY=VALUE")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for plan.svg and plan.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print what a recipe will do before it runs: phases, cost, the budgets it serves, and a plot of the rate.

    Rates are multiples of the recipe's peak. Checkpoints are numbers of updates after which the schedule has decayed.

    Example: torchstone plan recipes/tiny.yaml 'schedule={kind: wsd-s, cycles: [250, 500]}' budget.steps=1000
    """
    from rich.console import Console

    from torchstone.recipe.load import load_recipe
    from torchstone.storage.names import safe_text
    from torchstone.train.plan import plan_of

    found = plan_of(load_recipe(file, overrides or []))
    written = found.write(out) if out is not None else ()
    if as_json:
        typer.echo(json.dumps(found.as_json(), allow_nan=False))
    else:
        _print(found, Console())
    if written:
        typer.echo(f"Wrote {', '.join(path.name for path in written)} in {safe_text(str(out))}", err=as_json)


def _print(found: RunPlan, console: Console) -> None:
    from torchstone.cli.recipe import human
    from torchstone.optim.schedules.plot import text_lines

    peak = f", peak {found.schedule.peak:g}" if found.schedule.peak is not None else ""
    console.print(
        f"Schedule {found.kind}{peak}: {found.steps:,} steps, {human(found.tokens)} tokens, {human(found.flops)} FLOPs\n",
        highlight=False,
    )
    width = min(console.width - 10, 72)
    for line in text_lines(found.schedule, max(width, 10), plain=not console.encoding.lower().startswith("utf")):
        console.print(line, highlight=False, markup=False, no_wrap=True)
    console.print()
    console.print(_phases(found))
    console.print()
    compared = _compared(found)
    console.print(_served(found, compared))
    note = (
        "Steps count from 0. Rates are multiples of the peak. A checkpoint is the state after that many updates; training keeps "
        "it."
    )
    if compared:
        note += " wsd: updates behind a checkpoint of WSD, which throws its decays away, at the same total cost."
    if max(len(found.phases), len(found.served)) > MOST_ROWS:
        note += " --json and --out have all rows."
    console.print(note, highlight=False)


def _compared(found: RunPlan) -> bool:
    """True for a plan that keeps decays between stretches of plateau, so that WSD is its alternative."""
    return any(budget.earlier_decays and budget.stable for budget in found.served)


def _phases(found: RunPlan) -> Table:
    from torchstone.cli.recipe import human

    sources = any(phase.sources for phase in found.phases)
    table = _table(["stage", "steps", "tokens", "FLOPs", "share", "rate from", "to", *["sources"] * sources])
    for phase in _shortened(found.phases):
        if isinstance(phase, int):
            table.add_row("…", f"{phase:,} more")
            continue
        shares = [" ".join(f"{share:g}" for share in phase.sources)] if sources else []
        table.add_row(
            phase.stage,
            f"{phase.begin:,} - {phase.end - 1:,}",
            human(phase.tokens),
            human(phase.flops),
            f"{phase.share:.1%}",
            f"{phase.first:.4g}",
            f"{phase.last:.4g}",
            *shares,
        )
    return table


def _served(found: RunPlan, compared: bool) -> Table:
    from torchstone.cli.recipe import human

    table = _table(["checkpoint", "tokens", "FLOPs", "warmup", "stable", "decay", *["wsd"] * compared])
    for budget in _shortened(found.served):
        if isinstance(budget, int):
            table.add_row(f"… {budget:,} more")
            continue
        table.add_row(
            f"{budget.step:,}",
            human(budget.tokens),
            human(budget.flops),
            *(f"{steps:,}" for steps in (budget.warmup, budget.stable, budget.decay)),
            *[f"{budget.step - budget.earlier_decays:,}"] * compared,
        )
    return table


def _shortened(rows: tuple[Row, ...]) -> tuple[Row | int, ...]:
    """The rows that are printed, the first and the last ones; between them the number of those left out."""
    if len(rows) <= MOST_ROWS:
        return rows
    return (*rows[: MOST_ROWS - LAST_ROWS], len(rows) - MOST_ROWS, *rows[-LAST_ROWS:])


def _table(headings: list[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 and heading == "stage" else "right", no_wrap=True)
    return table
