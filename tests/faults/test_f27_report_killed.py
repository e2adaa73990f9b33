"""F27: a process that is killed while it writes a report leaves every file old or new, never half."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from torchstone import report
from torchstone.report.result import Result

BUILDERS = Path(__file__).parents[1] / "report" / "results.py"
FILES = ("result.json", "report.md", "report.html")

# Writes NEW over a copy of the old report again and again; each child dies at its k-th file system event.
DRIVER = """
import os, shutil, sys
from pathlib import Path
from torchstone import report
from torchstone.report.result import Result
old, new, work = (Path(argument) for argument in sys.argv[1:4])
result = report.load(new)
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}
for deadline in range(1, 200):
    case = work / f"{deadline:03d}"
    shutil.copytree(old, case)
    child = os.fork()
    if child == 0:
        seen = 0
        def die(event, arguments):
            global seen
            if event in EVENTS and str(case) in str(arguments[0]):
                seen += 1
                if seen == deadline:
                    os._exit(9)
        sys.addaudithook(die)
        report.write(result, case)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""

STAGED = """
import os, sys
from pathlib import Path
from torchstone import report
from torchstone.storage import atomic
target, new, deadline = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
result = report.load(new)
seen = 0
def hook(stage):
    global seen
    seen += 1
    if seen == deadline:
        os._exit(9)
atomic.stage_hook = hook
report.write(result, target)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An old report and a new one."""
    spec = importlib.util.spec_from_file_location("killed_results", BUILDERS)
    assert spec is not None and spec.loader is not None
    results: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    root = tmp_path_factory.mktemp("reports")
    new: Result = results.study(points=50)
    report.write(new.model_copy(update={"title": "The old report"}), root / "old")
    report.write(new, root / "new")
    return root / "old", root / "new"


def check(case: Path, old: Path, new: Path) -> list[bool]:
    """Every file is the old or the new one; returns which are new."""
    fresh = []
    for name in FILES:
        content = (case / name).read_bytes()
        assert content in ((old / name).read_bytes(), (new / name).read_bytes()), (
            f"{case.name}: {name} is neither old nor new"
        )
        fresh.append(content == (new / name).read_bytes())
    report.load(case)
    return fresh


def test_killed_at_every_file_event(folders: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = folders
    subprocess.run([sys.executable, "-c", DRIVER, str(old), str(new), str(tmp_path)], check=True, timeout=60)
    cases = sorted(tmp_path.iterdir())
    states = [check(case, old, new) for case in cases]
    assert len(cases) >= 7, "every file takes at least an open and a rename"
    assert states[0] == [False] * 3 and states[-1] == [True] * 3
    assert all(left <= right for state in states for left, right in zip(state[1:], state, strict=False)), (
        "the truth comes first"
    )


def test_killed_at_stages_of_the_write(folders: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = folders
    for deadline in (2, 8, 12):
        case = tmp_path / str(deadline)
        shutil.copytree(old, case)
        died = subprocess.run([sys.executable, "-c", STAGED, str(case), str(new), str(deadline)], timeout=60).returncode
        assert died == 9
        check(case, old, new)


def test_a_full_disk_keeps_the_old_report(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = folders
    case = tmp_path / "full"
    shutil.copytree(old, case)

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(report.load(new), case)
    assert check(case, old, new) == [False] * 3
    assert sorted(entry.name for entry in case.iterdir()) == sorted(FILES)
