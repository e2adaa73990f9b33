"""`torchstone runs DIR…`: the tree of runs and their branches, with what each cost and gained, and a report of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torchstone.train.tree import RunTree, TreeRun


def runs(
    directories: Annotated[
        list[Path], typer.Argument(help="Run directories, or folders that hold some at any depth.", metavar="DIR...")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: runs/tree-FINGERPRINT, by the runs' ids.")
    ] = None,
) -> None:
    """Show which run branched or grew from which, what each cost, and what each gained.

    Parents that are elsewhere are found by the records of their branches. The runs are only read; the report is one
    self-contained page with the curves of all branches.

    Example: torchstone runs runs/plateau runs/decay-800 runs/decay-1600
    """
    from torchstone.lab.tree_report import tree_report
    from torchstone.storage.names import safe_text

    tree, finding, page = tree_report(directories, out)
    _print(tree)
    typer.echo(safe_text(finding.answer))
    for problem in tree.problems:
        typer.echo(f"warning: {safe_text(problem)}", err=True)
    typer.echo(f"report: {safe_text(str(page))}")


def _print(tree: RunTree) -> None:
    """The tree with rich's lines on a terminal, with indentation elsewhere."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from torchstone.diagnose.run_tree import line_of
    from torchstone.storage.names import safe_text

    console = Console()
    lines = {run.record.id: safe_text(line_of(run)) for run in tree.runs}
    if not (console.is_terminal and console.encoding.lower().startswith("utf")):
        for run in tree.runs:
            typer.echo(f"{'  ' * run.depth}{lines[run.record.id]}")
        return

    def grow(branch: Any, run: TreeRun | None) -> None:
        for child in tree.children(run):
            grow(branch.add(Text(lines[child.record.id])), child)

    shown = Tree(Text("runs"), hide_root=True)
    grow(shown, None)
    console.print(shown)
