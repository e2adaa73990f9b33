"""F18: two processes run the same study at once and one is killed while it holds a cell: no cell twice, none lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tiny import tiny_recipe

from torchstone.lab.compare import compare
from torchstone.lab.progress import Quiet
from torchstone.lab.runner import RunOptions
from torchstone.recipe.load import load_recipe
from torchstone.recipe.yaml import dump_yaml

RECIPE = tiny_recipe(budget={"steps": 400}, checkpoint={"every": 50, "keep": 2})
ARM = "slow:optimizer.learning_rate=1e-3"
SEEDS = 2
CELLS = {(arm, seed) for arm in ("baseline", "slow") for seed in range(SEEDS)}
DONE = re.compile(r"\d+/\d+ (\w+) seed (\d+) done")


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """`torchstone compare` on the shared directory, one cell at a time, its lines in a log."""
    words = [
        "compare",
        "recipe.yaml",
        "--arm",
        ARM,
        "--seeds",
        str(SEEDS),
        "--match",
        "none",
        "--jobs",
        "1",
        "--out",
        "study",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "torchstone", *words], cwd=folder, stderr=sink, stdout=sink, env=environment
        )


def cells_of(log: Path) -> list[tuple[str, int]]:
    """Cells that the process itself finished (not those that it took from another)."""
    return [(arm, int(seed)) for arm, seed in DONE.findall(log.read_text())]


def holds_a_cell(folder: Path, pid: int) -> bool:
    """True if a lease names the process and its cell is training."""
    for lease in folder.glob("study/cells/*/*/cell.lease"):
        try:
            owner = json.loads(lease.read_bytes())["owner"]
        except (OSError, ValueError):
            continue
        if owner.split(":")[1] == str(pid) and not (lease.parent / "cell.json").exists():
            return bool(list(lease.parent.rglob("metrics.jsonl")))
    return False


def wait_until(condition, *processes: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        assert all(process.poll() is None for process in processes), "a process ended too early"
        time.sleep(0.05)


def test_f18_two_processes_share_a_study_and_one_dies(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(load_recipe(RECIPE)))
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    first, second = (start(tmp_path, log) for log in logs)
    try:
        wait_until(lambda: holds_a_cell(tmp_path, first.pid), first, second)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert second.wait(180) == 0, logs[1].read_text()[-3000:]
    finally:
        for process in (first, second):
            if process.poll() is None:
                process.kill()
                process.wait()

    done = Counter(cells_of(logs[0]) + cells_of(logs[1]))
    assert done == dict.fromkeys(CELLS, 1), (logs[0].read_text(), logs[1].read_text())
    assert len(list(tmp_path.glob("study/cells/*/*/cell.json"))) == len(CELLS)
    assert "Traceback" not in logs[1].read_text()

    shared = json.loads((tmp_path / "study" / "result.json").read_text())
    alone = compare(
        RECIPE, [ARM], seeds=SEEDS, match="none", out=tmp_path / "alone", options=RunOptions(on="inline"),
        progress=Quiet(),
    ).result  # fmt: skip
    expected = {(cell.arm, cell.seed): cell.metrics["validation_loss"] for cell in alone.cells}
    assert {(cell["arm"], cell["seed"]): cell["metrics"]["validation_loss"] for cell in shared["cells"]} == expected
