"""F13: data that changed between save and resume has another fingerprint, which the trainer compares."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from torchstone.data.files import FilesConfig
from torchstone.data.text import TextConfig

ROWS = [{"text": f"row {n} of the data that a run was started on"} for n in range(200)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
WRITE: dict[str, Callable[[Path], object]] = {
    "rows.txt": lambda path: path.write_bytes(LINES),
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES, mtime=0)),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard.ZstdCompressor().compress(LINES)),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


def fingerprint(path: Path, cache: Path, **settings: object) -> str:
    corpus = {"kind": "files", "paths": str(path), **settings}
    return TextConfig(corpus=corpus, tokenizer="bytes", length=16).build(cache).fingerprint


@pytest.mark.parametrize("name", WRITE)
def test_any_byte_that_is_appended_changes_the_fingerprint_of_the_corpus(tmp_path: Path, name: str) -> None:
    """Also one that changes no document, and one that makes the file unreadable: the hash is of the file."""
    path = tmp_path / name
    WRITE[name](path)
    before = FilesConfig(paths=str(path)).build().fingerprint
    assert FilesConfig(paths=str(path)).build().fingerprint == before
    content = path.read_bytes()
    found = {before}
    for byte in (b"\n", b"x", b"\0"):
        path.write_bytes(content + byte)
        found.add(FilesConfig(paths=str(path)).build().fingerprint)
    assert len(found) == 4
    path.write_bytes(content)
    assert FilesConfig(paths=str(path)).build().fingerprint == before


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl"])
def test_the_source_of_data_shows_the_change_although_tokens_are_cached(tmp_path: Path, name: str) -> None:
    path, cache = tmp_path / name, tmp_path / "cache"
    WRITE[name](path)
    before = fingerprint(path, cache)
    assert fingerprint(path, cache) == before
    with open(path, "ab") as file:
        file.write(b"\n")
    assert fingerprint(path, cache) != before
    WRITE[name](path)
    assert fingerprint(path, cache) == before


def test_a_file_that_is_added_removed_or_renamed_is_a_change(tmp_path: Path) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(LINES)
    before = fingerprint(folder / "*.jsonl", cache)
    (folder / "c.jsonl").write_bytes(b'{"text": "one more"}\n')
    added = fingerprint(folder / "*.jsonl", cache)
    (folder / "c.jsonl").rename(folder / "d.jsonl")
    renamed = fingerprint(folder / "*.jsonl", cache)
    assert len({before, added, renamed}) == 3
    (folder / "d.jsonl").unlink()
    assert fingerprint(folder / "*.jsonl", cache) == before


def test_the_time_and_the_place_of_a_file_are_no_change(tmp_path: Path) -> None:
    cache, fingerprints = tmp_path / "cache", set()
    for place in ("one", "two/deeper"):
        path = tmp_path / place / "rows.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(LINES)
        fingerprints.add(fingerprint(path, cache))
    assert len(fingerprints) == 1


def test_a_stricter_cap_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    """Tokens that were built with many bad rows allowed must not serve a run that allows few."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES + b"{}\n" * 50)
    fingerprint(path, tmp_path / "cache", skip_bad=True, skip_bad_cap=0.5)
    with pytest.raises(ValueError, match="50 of 250 rows are bad, more than skip_bad_cap=0.01"):
        fingerprint(path, tmp_path / "cache", skip_bad=True)
