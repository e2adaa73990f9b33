"""Atomic files and directories: whole or absent, and no litter after an error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from torchstone.storage import atomic
from torchstone.storage.atomic import atomic_directory, atomic_write, partial_owner_lives


@pytest.mark.parametrize("content", ["text λ", b"\x00bytes", "", b""])
def test_write_makes_and_replaces(tmp_path, content):
    path = tmp_path / "file"
    for _ in range(2):
        atomic_write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"]


def _fail_at(stage, monkeypatch, error=KeyboardInterrupt):
    def hook(reached):
        if reached == stage:
            raise error

    monkeypatch.setattr(atomic, "stage_hook", hook)


@pytest.mark.parametrize("stage", ["file opened", "file written", "file flushed"])
def test_write_that_is_interrupted_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage):
    path = tmp_path / "file"
    atomic_write(path, "old")
    _fail_at(stage, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_into_a_missing_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(tmp_path / "absent" / "file", "x")
    assert "absent" in str(caught.value)


def test_directory_appears_at_the_end_of_the_block(tmp_path):
    target = tmp_path / "deep" / "target"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert (target / "sub" / "b").read_text() == "2"
    assert os.listdir(target.parent) == ["target"]


def test_directory_is_not_made_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "target") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_directory_never_replaces_one_that_is_there(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "theirs").write_text("kept")
    with pytest.raises(OSError), atomic_directory(tmp_path / "target") as folder:
        (folder / "ours").write_text("lost")
    assert os.listdir(tmp_path) == ["target"]
    assert (tmp_path / "target" / "theirs").read_text() == "kept"


def test_errors_of_a_full_disk_name_the_file(tmp_path, monkeypatch):
    _fail_at("file written", monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / "file", "x")
    assert caught.value.filename == str(tmp_path / "file")


def test_owner_of_a_partial_name():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert partial_owner_lives(f"x{atomic.PARTIAL}{os.getpid()}-ab")
    assert not partial_owner_lives(f"x{atomic.PARTIAL}{ended.pid}-ab")
    assert not partial_owner_lives(f"x{atomic.PARTIAL}nonsense")
    assert not partial_owner_lives(f"x{atomic.PARTIAL}{10**30}-ab")
