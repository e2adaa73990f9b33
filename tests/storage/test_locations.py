"""Paths, globs and URLs to files."""

from __future__ import annotations

import fsspec
import pytest

from torchstone.errors import DataError, DependencyError
from torchstone.storage.locations import expand, open_binary


def test_paths_globs_and_urls(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert expand(str(tmp_path / "a.txt")) == [str(tmp_path / "a.txt")]
    assert expand(f"{tmp_path}/*.txt") == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert expand(f"file://{tmp_path}/*.txt") == [f"file://{tmp_path}/a.txt", f"file://{tmp_path}/b.txt"]
    with open_binary(f"file://{tmp_path}/a.txt") as file:
        assert file.read() == b"a.txt"


def test_other_file_systems():
    memory = fsspec.filesystem("memory")
    memory.pipe("/torchstone-test/a.txt", b"alpha")
    memory.pipe("/torchstone-test/b.txt", b"beta")
    try:
        found = expand("memory://torchstone-test/*.txt")
        assert found == ["memory:///torchstone-test/a.txt", "memory:///torchstone-test/b.txt"]
        with open_binary(found[1]) as file:
            assert file.read() == b"beta"
    finally:
        memory.rm("/torchstone-test", recursive=True)


@pytest.mark.parametrize("location", ["absent.txt", "*.absent", "", ".", "file:///absent/*"])
def test_nothing_there_is_a_data_error(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        expand(location)


def test_unknown_protocols_are_typed_errors():
    with pytest.raises((DataError, DependencyError)):
        expand("nonsense://bucket/file")
    with pytest.raises((DataError, DependencyError)):
        open_binary("nonsense://bucket/file")
    with pytest.raises(DataError):
        open_binary("/absent/file")
