"""F5: the disk fills during a save, a journal record or any atomic write; what was there stays, and the error says so (P6).

Two kinds of full: a limit on the size of files, in a child process, and a real file system of two megabytes.
"""

from __future__ import annotations

import os
import resource
import subprocess

import pytest
import torch
from snapshots import assert_same, make_snapshot, run_in_child

from torchstone.errors import CheckpointError
from torchstone.storage.atomic import atomic_write
from torchstone.storage.journal import Journal
from torchstone.train import checkpoint
from torchstone.train.checkpoint import CheckpointStore, Snapshot

MEGABYTE = 1 << 20
BIG = Snapshot(2, {"model": {"weight": torch.zeros(MEGABYTE)}}, {})  # 4 MB


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command; the file-size limit stands for a full disk in the other tests")
    if done.returncode:
        pytest.skip(f"may not mount a small disk ({done.stderr.strip()}); the file-size limit stands for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def quick(monkeypatch):
    """Retries without waiting, counted."""
    waits: list[float] = []
    monkeypatch.setattr(checkpoint.time, "sleep", waits.append)
    return waits


def limit_files(size):
    """From here on this process cannot write beyond `size` bytes of a file (Python ignores the signal that comes with it)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def assert_refused_and_intact(store, snapshot):
    with pytest.raises(CheckpointError) as caught:
        store.save(snapshot)
    text = str(caught.value)
    assert str(store.directory) in text and "newest: step 1" in text and "free space" in text
    assert sorted(os.listdir(store.directory)) == ["latest", "step-00000001"], "no litter"
    assert_same(store.load(), make_snapshot(1))


def test_f05_save_under_a_file_size_limit(tmp_path, quick):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(make_snapshot(1))

    def child():
        limit_files(MEGABYTE)
        assert_refused_and_intact(store, BIG)
        assert len(quick) == checkpoint.RETRIES
        store.save(make_snapshot(2))  # what fits is still saved

    assert run_in_child(child) == 0
    assert_same(store.load(), make_snapshot(2))


@pytest.mark.parametrize("size", [0, 1, 100, 300, 600, 900])
def test_f05_save_stopped_at_any_file(tmp_path, quick, size):
    """The limit falls into the tensors, the manifest or the pointer."""
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(make_snapshot(1))

    def child():
        limit_files(size)
        try:
            store.save(make_snapshot(2))
        except CheckpointError as error:
            assert "free space" in str(error)

    assert run_in_child(child) == 0
    assert store.latest() in (1, 2)
    assert_same(store.load(), make_snapshot(store.latest()))
    store.save(make_snapshot(3))
    assert_same(store.load(), make_snapshot(3))


def test_f05_save_on_a_full_file_system(small_disk, quick):
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(make_snapshot(1))
    assert_refused_and_intact(store, BIG)
    assert len(quick) == checkpoint.RETRIES


def test_f05_no_space_for_even_a_folder(small_disk, quick):
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(make_snapshot(1))
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert_refused_and_intact(store, make_snapshot(2))
    (small_disk / "filler").unlink()
    store.save(make_snapshot(2))
    assert_same(store.load(), make_snapshot(2))


def test_f05_space_that_comes_free_is_used_by_the_next_try(small_disk, monkeypatch):
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(make_snapshot(1))
    filler = small_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: filler.unlink(missing_ok=True))
    store.save(make_snapshot(2))
    assert_same(store.load(), make_snapshot(2))


def test_f05_preflight_refuses_before_anything_is_done(small_disk):
    store = CheckpointStore(small_disk / "checkpoints", keep=2)
    store.check_space(MEGABYTE // 2)
    with pytest.raises(CheckpointError, match=r"GB free; keeping 2 checkpoints"):
        store.check_space(MEGABYTE)
    assert store.steps() == []


def test_f05_journal_under_a_file_size_limit(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    first = {"step": 1, "loss": 2.5}
    journal.append(first)
    size = journal.path.stat().st_size

    def child():
        limit_files(size + 5)
        with pytest.raises(OSError) as caught:
            journal.append({"step": 2, "loss": 2.25})
        assert caught.value.filename == str(journal.path)

    assert run_in_child(child) == 0
    found = journal.read()
    assert found.records == (first,) and len(found.warnings) == 1 and "torn" in found.warnings[0]
    journal.append({"step": 2})
    assert journal.read().records == (first, {"step": 2})


def test_f05_journal_on_a_full_file_system(small_disk):
    journal = Journal(small_disk / "metrics.jsonl")
    written = 0
    with pytest.raises(OSError) as caught:
        while True:
            journal.append({"step": written, "text": "x" * 5000})
            written += 1
    assert caught.value.filename == str(journal.path)
    found = journal.read()
    assert [record["step"] for record in found.records] == list(range(written))
    assert len(found.warnings) <= 1


def test_f05_atomic_write_under_a_file_size_limit(tmp_path):
    path = tmp_path / "report.html"
    atomic_write(path, "old")

    def child():
        limit_files(1000)
        with pytest.raises(OSError) as caught:
            atomic_write(path, "x" * 10_000)
        assert caught.value.filename == str(path)

    assert run_in_child(child) == 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]
