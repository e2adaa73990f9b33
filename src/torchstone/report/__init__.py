"""Reports of a finished comparison or study: one self-contained HTML file, Markdown, and the JSON they are
made from.

`write(result, directory)` writes all three, `render` makes the two readable ones again from a loaded result,
and `load(directory)` reads `result.json` back. Everything here only shows: no number in a report is computed
from anything but `torchstone.report.result.Result`.
"""

from __future__ import annotations

from torchstone.report.write import load, render, write

__all__ = ["load", "render", "write"]
