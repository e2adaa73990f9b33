"""F2: the process dies at each stage of storage's protocols; what is there is the old or the new, whole (P1)."""

from __future__ import annotations

import os
import shutil

import pytest
from snapshots import assert_same, make_snapshot, run_in_child

from torchstone.storage import atomic
from torchstone.storage.atomic import atomic_directory, atomic_write
from torchstone.train.checkpoint import CheckpointStore

DIED = 77


def stages_of(action):
    """Names of the stages that an action passes, in order (in a child, so that nothing here changes)."""
    read, write = os.pipe()

    def record():
        atomic.stage_hook = lambda stage: os.write(write, stage.encode() + b"\n")
        action()

    assert run_in_child(record) == 0
    os.close(write)
    with open(read, encoding="utf-8") as file:
        return file.read().splitlines()


def die_at(number, action):
    """Run the action in a child that dies at its stage of that number (from 0), without any clean-up."""

    def die():
        count = iter(range(1_000))
        atomic.stage_hook = lambda stage: os._exit(DIED) if next(count) == number else None
        action()

    assert run_in_child(die) == DIED


def each_stage(tmp_path, prepare, action):
    """For every stage: a prepared folder on which the action died there, and the stage's name."""
    prepare(tmp_path / "count")
    stages = stages_of(lambda: action(tmp_path / "count"))
    for number, stage in enumerate(stages):
        folder = tmp_path / f"{number}"
        prepare(folder)
        die_at(number, lambda folder=folder: action(folder))
        yield folder, stage


def test_f02_atomic_write(tmp_path):
    def prepare(folder):
        folder.mkdir()
        (folder / "file").write_text("old")

    found = {}
    for folder, stage in each_stage(tmp_path, prepare, lambda folder: atomic_write(folder / "file", "new")):
        found[stage] = (folder / "file").read_text()
        atomic_write(folder / "file", "newer")
        assert (folder / "file").read_text() == "newer"
    assert found == {
        "file opened": "old",
        "file written": "old",
        "file flushed": "old",
        "file renamed": "new",
        "file's parent flushed": "new",
    }


def test_f02_atomic_directory(tmp_path):
    def fill(folder):
        with atomic_directory(folder / "target") as partial:
            (partial / "a").write_text("1")
            (partial / "b").write_text("2")

    found = {}
    for folder, stage in each_stage(tmp_path, lambda folder: folder.mkdir(), fill):
        target = folder / "target"
        found[stage] = target.exists()
        if target.exists():
            assert sorted(os.listdir(target)) == ["a", "b"]
        else:
            fill(folder)
            assert sorted(os.listdir(target)) == ["a", "b"]
    assert list(found.values()) == [False] * 4 + [True] * 2, found


SITUATIONS = {
    "first": (2, ()),
    "beside older ones": (2, (1, 2)),
    "keeping one": (1, (1, 2)),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_f02_save(tmp_path, situation):
    keep, earlier = SITUATIONS[situation]

    def store_of(folder):
        return CheckpointStore(folder / "checkpoints", keep)

    def prepare(folder):
        for step in earlier:
            store_of(folder).save(make_snapshot(step))

    stages = []
    for folder, stage in each_stage(tmp_path, prepare, lambda folder: store_of(folder).save(make_snapshot(3))):
        stages.append(stage)
        store = store_of(folder)
        newest = store.latest()
        assert newest in {3, max(earlier, default=None)}, stage
        if newest is not None:
            assert_same(store.load(), make_snapshot(newest))
        for step in (3, 4):  # the same command again, and on
            store.save(make_snapshot(step))
        assert_same(store.load(), make_snapshot(4))
        kept = [f"step-{step:08d}" for step in (*earlier, 3, 4)[-keep:]]
        assert sorted(os.listdir(store.directory)) == ["latest", *kept], stage
    assert len(stages) == 15 + (2 if len(earlier) >= keep else 0), stages


def test_f02_save_in_place_of_a_damaged_step(tmp_path):
    """Setting a damaged step aside and writing it anew never costs the older one."""

    def store_of(folder):
        return CheckpointStore(folder / "checkpoints", 2, say=lambda text: None)

    def prepare(folder):
        store = store_of(folder)
        for step in (1, 2):
            store.save(make_snapshot(step))
        shutil.copytree(store.path(2), store.path(9))  # of a run that was left
        (store.path(2) / "model.safetensors").write_bytes(b"damaged")

    for folder, stage in each_stage(tmp_path, prepare, lambda folder: store_of(folder).save(make_snapshot(2))):
        store = store_of(folder)
        assert store.load(fallback=True).step in (1, 2), stage
        store.save(make_snapshot(2))
        assert_same(store.load(), make_snapshot(2))
        aside = sorted(item.name[:13] for item in store.directory.iterdir() if ".set-aside-" in item.name)
        assert aside == ["step-00000002", "step-00000009"]
