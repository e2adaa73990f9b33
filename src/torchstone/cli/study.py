"""`torchstone study list|show|run`: the published claims, and how to test them again."""

from __future__ import annotations

from typing import Annotated

import typer

from torchstone.cli.options import Jobs, MaxSeeds, On, Out, UntilDecided, most_seeds

study = typer.Typer(no_args_is_help=True, help="Studies: published claims that one command tests again.")


@study.command("list")
def list_studies() -> None:
    """List the studies with the question of each."""
    from rich.console import Console
    from rich.table import Table

    from torchstone.lab.catalogue import slugs
    from torchstone.lab.catalogue import study as find

    table = Table("study", "question", "scales")
    for slug in slugs():
        found = find(slug)
        table.add_row(slug, found.question, ", ".join(found.scales))
    Console().print(table)


@study.command("show")
def show(
    slug: Annotated[str, typer.Argument(help="Slug of a method; see `torchstone study list`.")],
    scale: Annotated[str, typer.Option(help="Scale whose arms are shown.")] = "toy",
) -> None:
    """Show a study's claims, its arms and how they differ from the baseline, before running anything."""
    from rich.console import Console

    from torchstone.lab.catalogue import study as find
    from torchstone.lab.describe import describe

    for line in describe(find(slug), scale):
        Console().print(line, markup=False, highlight=False)


@study.command("run")
def run(
    slug: Annotated[str, typer.Argument(help="Slug of a method; see `torchstone study list`.")],
    scale: Annotated[str, typer.Option(help="smoke (seconds), toy (minutes on a laptop) or gpu.")] = "toy",
    seeds: Annotated[int | None, typer.Option(help="Paired seeds; default: the scale's.")] = None,
    until_decided: UntilDecided = False,
    max_seeds: MaxSeeds = None,
    on: On = "local",
    jobs: Jobs = None,
    out: Out = None,
) -> None:
    """Run a study to its verdicts and write result.json, report.html and report.md."""
    from torchstone.lab.catalogue import study as find
    from torchstone.lab.runner import RunOptions, run_study
    from torchstone.report.terminal import print_verdicts

    options = RunOptions(scale, seeds, out, on, jobs, most_seeds(until_decided, max_seeds))
    finished = run_study(find(slug), options)
    print_verdicts(finished.result, finished.directory)
