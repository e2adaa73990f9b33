"""`torchstone report DIR`: make report.html and report.md again from result.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a finished study or comparison (holds result.json).")],
) -> None:
    """Make report.html and report.md again from result.json, and print the verdicts."""
    from torchstone.report.terminal import print_verdicts
    from torchstone.report.write import load, render

    result = load(directory)
    folder = directory.parent if directory.is_file() else directory
    render(result, folder)
    print_verdicts(result, folder)
