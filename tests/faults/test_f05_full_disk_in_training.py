"""F5: the disk fills while a run saves or records; it stops cleanly, and goes on to the same weights once there is room."""

from __future__ import annotations

import json
import subprocess
import sys

from tiny import tiny_recipe

from torchstone.storage.journal import Journal
from torchstone.train.checkpoint import CheckpointStore

LIMIT = 20_000  # bytes of a file; the optimizer's does not fit


def recipe(steps):
    return tiny_recipe(budget={"steps": steps}, checkpoint={"every": 2, "keep": 2})


def test_f05_while_saving(zygote, weights, fast_path):
    assert zygote.run(recipe(6), fast_path / "whole") == 0
    directory = fast_path / "run"
    assert zygote.run(recipe(2), directory) == 0
    assert zygote.run(recipe(6), directory, file_limit=LIMIT) == 3
    message = zygote.log.read_text().splitlines()[-1]
    assert message.startswith("CheckpointError: cannot save step 4") and "newest: step 2" in message
    store = CheckpointStore(directory / "checkpoints")
    assert store.load().step == 2
    assert not [item for item in store.directory.iterdir() if ".partial-" in item.name]
    assert zygote.run(recipe(6), directory) == 0
    assert weights(directory) == weights(fast_path / "whole")


RECORDING = """
import json, resource, sys
import torch
from torchstone.cli.main import explain
from torchstone.train.precision import Compute
from torchstone.train.run import train

torch.set_num_threads(1)
recipe, directory, limit = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    train(recipe, directory, compute=Compute("fp32", False), progress=lambda state: None)
except Exception as error:
    message, code = explain(error)
    print(message)
    sys.exit(code)
"""


def test_f05_while_recording_metrics(zygote, weights, tmp_path):
    """Small models record more than they weigh: the metrics fill the disk before a checkpoint does."""
    long = tiny_recipe(budget={"steps": 60}, checkpoint={"every": None, "keep": 1})
    assert zygote.run(long, tmp_path / "whole") == 0
    command = [sys.executable, "-c", RECORDING, json.dumps(long), str(tmp_path / "run"), "6000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "metrics.jsonl" in done.stdout and "free space" in done.stdout
    read = Journal(tmp_path / "run" / "metrics.jsonl").read()
    assert read.records and len(read.warnings) <= 1
    assert zygote.run(long, tmp_path / "run") == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_f05_before_the_start(tmp_path):
    """What the checkpoints of a run will take is compared with the free space before the first step."""
    script = (
        "import json, shutil, sys, collections\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(10**6, 10**6 - 1000, 1000)\n"
        "from torchstone.train.run import train\n"
        "from torchstone.errors import CheckpointError\n"
        "try:\n"
        "    train(json.loads(sys.argv[1]), sys.argv[2], progress=lambda state: None)\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, json.dumps(recipe(6)), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "GB free; keeping 2 checkpoints" in done.stdout
    assert Journal(tmp_path / "run" / "metrics.jsonl").read().records == ()
