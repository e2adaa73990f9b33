"""F4: SIGTERM and SIGINT stop within one step with a checkpoint and code 75; a second signal ends at once (P9)."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from tiny import tiny_recipe

from torchstone.errors import InterruptedRun
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.events import read_history
from torchstone.train.precision import Compute
from torchstone.train.run import train
from torchstone.train.signals import Stop

LONG = tiny_recipe(budget={"steps": 1_000_000})


def wait_for_steps(directory, count=3):
    end = time.monotonic() + 30
    while len(read_history(directory)[0]["train"]["steps"]) < count:
        assert time.monotonic() < end, "training did not start"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f04_one_signal_saves_within_a_step(zygote, tmp_path, number):
    pid = zygote.start(LONG, tmp_path / "run")
    wait_for_steps(tmp_path / "run")
    os.kill(pid, number)
    assert zygote.wait() == 75
    steps = read_history(tmp_path / "run")[0]["train"]["steps"]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").load().step == steps[-1]
    last = zygote.log.read_text().strip().splitlines()[-1]
    assert last.startswith(f"InterruptedRun: stopped by {signal.Signals(number).name} after step {steps[-1]}")
    assert "Traceback" not in last


def test_f04_a_second_signal_ends_at_once(zygote, tmp_path):
    """Both arrive while the child is stopped, so that it cannot save between them."""
    pid = zygote.start(LONG, tmp_path / "run")
    wait_for_steps(tmp_path / "run")
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        os.kill(pid, number)
    assert zygote.wait() == 75
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == []


def test_f04_in_a_thread_the_caller_stops_the_run(tmp_path):
    torch.set_num_threads(1)
    stop, caught = Stop(), []

    def work():
        try:
            train(LONG, tmp_path / "run", compute=Compute("fp32", False), progress=lambda state: None, stop=stop)
        except InterruptedRun as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for_steps(tmp_path / "run")
    stop.ask("the notebook")
    thread.join(30)
    assert caught and "stopped by the notebook" in str(caught[0])
    assert CheckpointStore(tmp_path / "run" / "checkpoints").load().step >= 3
