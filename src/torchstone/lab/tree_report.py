"""The report of a tree of runs: read it, say what it cost and gained, write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchstone.diagnose.run_tree import run_tree_finding
from torchstone.lab.environment import environment
from torchstone.report.finding import Finding
from torchstone.report.finding_write import write
from torchstone.report.stamp import stamped
from torchstone.storage.hashing import fingerprint_of
from torchstone.train.tree import RunTree, read_tree


def tree_report(directories: Sequence[Path], out: Path | None = None) -> tuple[RunTree, Finding, Path]:
    """The tree of all runs in some directories, its finding, and the page that was written.

    Args:
        directories: run directories, or folders that hold some at any depth.
        out: folder of the report; None makes `runs/tree-FINGERPRINT`, by the runs' ids.

    Raises:
        ConfigError: a directory is not there, or holds no run.
    """
    tree = read_tree(directories)
    folder = out or Path("runs") / f"tree-{fingerprint_of(sorted(run.record.id for run in tree.runs))[:10]}"
    words = ["torchstone", "runs", *map(str, directories), *(["--out", str(out)] if out else [])]
    finding = stamped(run_tree_finding(tree), words, environment("cpu"))
    return tree, finding, write(finding, folder)
