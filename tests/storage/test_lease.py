"""P14, F18: one holder at a time; a dead holder's lease passes on; no clock of another is trusted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import cache

import pytest

from torchstone.storage import lease as module
from torchstone.storage.lease import Lease

TTL = 0.4

HOLD = """
import sys, time
from torchstone.storage.lease import Lease
lease = Lease(sys.argv[1], ttl=float(sys.argv[2]))
print(lease.acquire(), flush=True)
time.sleep(60)
"""

# Takes the lease again and again; while holding it, makes and removes a file that must not exist before.
WORK = """
import os, sys, time
from torchstone.storage.lease import Lease
path, guard, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
end, turns = time.monotonic() + seconds, 0
while time.monotonic() < end:
    lease = Lease(path, ttl=5)
    if not lease.acquire():
        continue
    os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
    os.unlink(guard)
    turns += 1
    lease.release()
print(turns)
"""


def _holder(path, ttl=TTL):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(ttl)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


def _elsewhere(path, owner="otherhost/pid[1]:1:abcdef", count=0):
    """A lease of a process on another machine, whose life can be seen by its counter only."""
    path.write_text(json.dumps({"owner": owner, "count": count}))


def _seconds_until(lease, limit=10.0):
    begun = time.monotonic()
    while not lease.acquire():
        assert time.monotonic() - begun < limit, "the lease never came free"
        time.sleep(0.01)
    return time.monotonic() - begun


def test_one_holder_at_a_time(tmp_path):
    first, second = Lease(tmp_path / "x"), Lease(tmp_path / "x")
    assert first.acquire() and first.held
    assert not second.acquire() and not second.held
    first.release()
    assert not first.held and not (tmp_path / "x").exists()
    assert second.acquire() and second.held
    second.release()
    assert os.listdir(tmp_path) == []


def test_release_is_harmless_twice_and_without_acquire(tmp_path):
    lease = Lease(tmp_path / "x")
    lease.release()
    assert lease.acquire()
    lease.release()
    lease.release()
    assert lease.acquire()
    lease.release()


def test_a_holder_that_beats_is_never_taken_over(tmp_path):
    holder, other = Lease(tmp_path / "x", ttl=TTL), Lease(tmp_path / "x", ttl=TTL)
    assert holder.acquire()
    end = time.monotonic() + 4 * TTL
    while time.monotonic() < end:
        assert not other.acquire()
        time.sleep(0.02)
    assert holder.held
    holder.release()


def test_a_holder_killed_on_this_machine_is_replaced_at_once(tmp_path):
    process = _holder(tmp_path / "x", ttl=60)
    other = Lease(tmp_path / "x", ttl=60)
    assert not other.acquire()
    process.kill()
    process.wait()
    assert other.acquire()
    other.release()
    assert os.listdir(tmp_path) == []


def test_a_holder_elsewhere_is_replaced_after_its_time(tmp_path):
    _elsewhere(tmp_path / "x")
    lease = Lease(tmp_path / "x", ttl=TTL)
    assert TTL <= _seconds_until(lease) < 20 * TTL
    lease.release()


def test_a_counter_that_moves_keeps_the_lease(tmp_path):
    lease = Lease(tmp_path / "x", ttl=TTL)
    for count in range(6):
        _elsewhere(tmp_path / "x", count=count)
        assert not lease.acquire()
        time.sleep(TTL / 2)


def test_a_stopped_process_loses_the_lease_and_does_not_take_it_back(tmp_path):
    process = _holder(tmp_path / "x")
    process.send_signal(signal.SIGSTOP)
    lease = Lease(tmp_path / "x", ttl=TTL)
    _seconds_until(lease)
    before = json.loads((tmp_path / "x").read_text())["owner"]
    process.send_signal(signal.SIGCONT)
    time.sleep(2 * TTL)
    assert lease.held
    assert json.loads((tmp_path / "x").read_text())["owner"] == before == lease.owner
    process.kill()
    process.wait()
    lease.release()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00garbage", b"[1]", b"{}", b'{"owner":3}', b"[" * 5000])
def test_a_lease_that_cannot_be_read_is_stale_after_its_time(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    lease = Lease(tmp_path / "x", ttl=TTL)
    assert not lease.acquire()
    assert _seconds_until(lease) >= TTL / 2
    lease.release()


def test_of_many_who_see_a_stale_lease_one_wins(tmp_path):
    for trial in range(20):
        path = tmp_path / f"x{trial}"
        _elsewhere(path, owner=f"{module._machine()}:{_dead_pid()}:00")
        leases = [Lease(path, ttl=60) for _ in range(6)]
        won: list[Lease] = []
        gate = threading.Barrier(len(leases))

        def compete(lease, gate=gate, won=won):
            gate.wait()
            if lease.acquire():
                won.append(lease)

        threads = [threading.Thread(target=compete, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert [lease for lease in leases if lease.held] == won
        for lease in won:
            lease.release()


@cache
def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_a_faster_rival_keeps_what_it_took(tmp_path, monkeypatch):
    """One judges a lease stale and is held up while another takes it over: it must not take that one away."""
    path = tmp_path / "x"
    _elsewhere(path, owner=f"{module._machine()}:{_dead_pid()}:00")
    slow, fast = Lease(path), Lease(path)
    judge = slow._stale_content

    def judge_and_be_held_up():
        found = judge()
        assert fast.acquire()
        return found

    monkeypatch.setattr(slow, "_stale_content", judge_and_be_held_up)
    assert not slow.acquire()
    assert fast.held
    fast.release()
    assert os.listdir(tmp_path) == []


def test_processes_that_compete_never_work_at_the_same_time(tmp_path):
    command = [sys.executable, "-c", WORK, str(tmp_path / "x"), str(tmp_path / "guard"), "1.5"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    turns = [worker.communicate(timeout=60)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sum(map(int, turns)) > 10


def test_a_full_disk_costs_the_lease_and_nothing_else(tmp_path, monkeypatch):
    lease = Lease(tmp_path / "x", ttl=0.1)
    assert lease.acquire()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    time.sleep(0.3)
    assert lease.held and lease._thread is not None and lease._thread.is_alive()
    lease.release()
    assert not (tmp_path / "x").exists()


def test_a_lease_that_cannot_be_written_is_not_taken_and_not_left(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError) as caught:
        Lease(tmp_path / "x").acquire()
    assert caught.value.filename == str(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_vanishes_ends_the_heartbeat_quietly(tmp_path):
    (tmp_path / "cell").mkdir()
    lease = Lease(tmp_path / "cell" / "x", ttl=0.1)
    assert lease.acquire()
    (tmp_path / "cell" / "x").unlink()
    (tmp_path / "cell").rmdir()
    time.sleep(0.2)
    assert not lease.held
    lease.release()
