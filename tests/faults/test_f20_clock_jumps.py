"""F20: the clock jumps backwards, or the time zone changes; order is by step and life is by counter, never by clock."""

from __future__ import annotations

import itertools
import json
import os
import time

import pytest
from snapshots import assert_same, make_snapshot

from torchstone.storage.journal import Journal
from torchstone.storage.lease import Lease
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.events import read_history

YEAR = 365 * 86_400
TTL = 0.3


@pytest.fixture
def mad_clock(monkeypatch):
    """The wall clock jumps by years, back and forth, at every look."""
    start = time.time()
    jumps = itertools.cycle([0, -YEAR, 2 * YEAR, -20 * YEAR, 5])
    monkeypatch.setattr(time, "time", lambda: start + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int((start + next(jumps)) * 1e9))


def set_age(path, seconds):
    """Set the times of a folder and everything in it to so long ago (negative: in the future)."""
    when = time.time() - seconds
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(item, (when, when))


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "Pacific/Marquesas"])
def test_f20_checkpoints_are_ordered_by_step(tmp_path, mad_clock, monkeypatch, zone):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for number, step in enumerate((1, 2, 3, 4)):
        store.save(make_snapshot(step))
        set_age(store.path(step), number * YEAR)  # the newest step looks oldest
        monkeypatch.setenv("TZ", zone)
        time.tzset()
    try:
        assert store.steps() == [3, 4]
        assert_same(store.load(), make_snapshot(4))
        (store.path(4) / "model.safetensors").unlink()
        assert_same(store.load(fallback=True, say=lambda text: None), make_snapshot(3))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_f20_no_time_decides_what_is_intact(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(make_snapshot(1))
    for age in (50 * YEAR, -50 * YEAR):
        set_age(store.directory, age)
        assert_same(store.load(), make_snapshot(1))


def test_f20_a_living_holder_keeps_its_lease(tmp_path, mad_clock):
    holder, other = Lease(tmp_path / "x", ttl=TTL), Lease(tmp_path / "x", ttl=TTL)
    assert holder.acquire()
    end = time.monotonic() + 5 * TTL
    for age in itertools.cycle([50 * YEAR, -50 * YEAR, 0]):
        set_age(tmp_path / "x", age)
        assert not other.acquire()
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    assert holder.held
    holder.release()


def test_f20_a_dead_holder_from_the_future_is_replaced(tmp_path, mad_clock):
    """Its file will look fresh for fifty years; its counter does not move."""
    (tmp_path / "x").write_text(json.dumps({"owner": "otherhost/pid[1]:1:ab", "count": 3}))
    set_age(tmp_path / "x", -50 * YEAR)
    lease = Lease(tmp_path / "x", ttl=TTL)
    begun = time.monotonic()
    while not lease.acquire():
        assert time.monotonic() - begun < 20 * TTL
        time.sleep(0.01)
    assert time.monotonic() - begun >= TTL
    lease.release()


def test_f20_journals_keep_the_order_of_writing(tmp_path, mad_clock):
    journal = Journal(tmp_path / "history.jsonl")
    for number in range(5):
        journal.append({"number": number, "at": time.time()})
    assert [record["number"] for record in journal.read().records] == list(range(5))


def test_f20_curves_are_ordered_by_step(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for step, seconds in ((1, 9.0), (2, 1.0), (3, 5.0), (2, 0.5)):  # step 2 again, after a resume
        axes = {"step": step, "tokens": step * 64, "flops": step * 1e6, "seconds": seconds}
        journal.append({"kind": "train", **axes, "loss": seconds})
    history, _ = read_history(tmp_path)
    assert history["train"]["tokens"] == [64, 128, 192]
    assert history["train"]["loss"] == [9.0, 0.5, 5.0]
