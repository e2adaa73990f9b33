"""F6: truncated, empty, missing and extra files; the damage is named and the older checkpoint used only as promised (P2)."""

from __future__ import annotations

import os
import shutil

import pytest
from snapshots import assert_same, files_of, make_snapshot

from torchstone.errors import CheckpointError
from torchstone.train.checkpoint import CheckpointStore

FILES = ("model.safetensors", "optimizer.safetensors", "manifest.json")


def _truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def _halve(path):
    os.truncate(path, path.stat().st_size // 2)


def _grow(path):
    with open(path, "ab") as file:
        file.write(b"\0")


def _replace_by_folder(path):
    path.unlink()
    path.mkdir()


def _dangle(path):
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def _link_outside(path):
    outside = path.parent.parent.parent / "outside"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


DAMAGE = {
    "one byte short": _truncate,
    "half": _halve,
    "one byte long": _grow,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": _replace_by_folder,
    "a dangling link": _dangle,
    "a link to the same content": _link_outside,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "the other step's": lambda path: shutil.copy(path.parent.parent / "step-00000001" / path.name, path),
}


@pytest.fixture
def store(tmp_path):
    """Steps 1 and 2."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        store.save(make_snapshot(step))
    return store


def assert_named_and_falls_back(store, *names):
    """The error names the damage; only `fallback` uses step 1, loudly; nothing is changed by either."""
    before = files_of(store.directory)
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert all(name in str(caught.value) for name in (*names, "--fallback", "Older checkpoints: 1"))
    said: list[str] = []
    assert_same(store.load(fallback=True, say=said.append), make_snapshot(1))
    assert len(said) == 1 and "WARNING" in said[0] and "step 1" in said[0]
    assert all(name in said[0] for name in names)
    assert files_of(store.directory) == before


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_f06_damage_to_a_file(store, name, damage):
    DAMAGE[damage](store.path(2) / name)
    assert_named_and_falls_back(store, str(store.path(2) / name))


@pytest.mark.parametrize("name", ["extra.safetensors", "notes.txt", ".hidden", "model.safetensors.bak"])
def test_f06_extra_file(store, name):
    (store.path(2) / name).write_bytes(b"")
    assert_named_and_falls_back(store, str(store.path(2) / name), "remove it")


def test_f06_the_newest_folder_is_gone(store):
    """`latest` remembers it: losing the newest checkpoint is not passed over in silence."""
    shutil.rmtree(store.path(2))
    assert_named_and_falls_back(store, str(store.path(2)), "missing")


def test_f06_every_folder_is_gone(store):
    for step in (1, 2):
        shutil.rmtree(store.path(step))
    assert store.latest() == 2
    with pytest.raises(CheckpointError, match=r"step-00000002 is missing"):
        store.load(fallback=True)


def test_f06_an_older_step_is_damaged(store):
    (store.path(1) / "model.safetensors").unlink()
    assert_same(store.load(), make_snapshot(2))
    with pytest.raises(CheckpointError, match=r"step-00000001.model\.safetensors is missing"):
        store.load(1)


def test_f06_all_steps_are_damaged(store):
    for step in (1, 2):
        (store.path(step) / "model.safetensors").unlink()
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"step-00000001.model\.safetensors is missing.*No other checkpoint"):
        store.load(fallback=True, say=said.append)
    assert len(said) == 1 and "step-00000002" in said[0]


def test_f06_a_step_that_is_asked_for_is_never_replaced(store):
    (store.path(2) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="step-00000002"):
        store.load(2, fallback=True)


@pytest.mark.parametrize("content", [b"", b"step-00000002", b"step-00000001\n", b"\xff\xfe", b"../../etc/passwd 00\n"])
def test_f06_damaged_pointer(store, content):
    (store.directory / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest is damaged.*--fallback"):
        store.load()
    said: list[str] = []
    assert_same(store.load(fallback=True, say=said.append), make_snapshot(2))
    assert len(said) == 1 and "latest" in said[0]
    for step in (1, 2):
        shutil.rmtree(store.path(step))
    with pytest.raises(CheckpointError, match="latest is damaged"):
        store.steps()


def test_f06_unreadable_file(store, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("torchstone.train.manifest.file_hash", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Permission denied"):
        store.load(2)
