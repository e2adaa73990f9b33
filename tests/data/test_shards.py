"""Damage of built data is found when it is opened; interrupted builds; what is said of skipped rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from torchstone.data.shards import open_shards
from torchstone.data.text import TextConfig, TextSource
from torchstone.errors import DataError

LINES = "".join(json.dumps({"text": f"document {n} says hello"}) + "\n" for n in range(300))


def build(path: Path, cache: Path, **corpus: object) -> TextSource:
    given_ = {"kind": "files", "paths": str(path), **corpus}
    return TextConfig(corpus=given_, tokenizer="bytes", length=16).build(cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("built")
    (place / "rows.jsonl").write_text(LINES)
    return build(place / "rows.jsonl", place / "cache").shards.folder


def same_meaning(one: bytes, other: bytes) -> bool:
    """True where only the blanks between values differ."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.data())
def test_a_flipped_bit_of_the_manifest_is_found(folder: Path, data: st.DataObject) -> None:
    path = folder / "manifest.json"
    content = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    assume(not same_meaning(content, bytes(damaged)))
    path.write_bytes(damaged)
    try:
        with pytest.raises(DataError, match="is damaged: .* Delete the folder"):
            open_shards(folder)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.tokens", "train.ends", "validation.documents.jsonl", "manifest.json"])
def test_an_absent_file_is_named(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")
    try:
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            open_shards(folder)
    finally:
        (folder / "elsewhere").rename(folder / name)
    open_shards(folder)


def test_skipped_rows_are_counted_said_once_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES + "{\n[]\n")
    shards = build(path, tmp_path / "cache", skip_bad=True).shards
    said = capsys.readouterr().err
    assert f"302 rows read, 300 kept, 2 skipped; the skipped ones are in {shards.folder}" in said
    assert (shards.kept, shards.rejected) == (300, 2) and len(shards.quarantine()) == 2
    build(path, tmp_path / "cache", skip_bad=True)
    assert capsys.readouterr().err == ""


STAGES = ["directory made", "directory filled", "files flushed", "directory flushed", "directory renamed"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_build_that_is_killed_at_any_stage_is_done_again(folder: Path, tmp_path: Path, stage: str) -> None:
    """What a dead process leaves behind is never taken for data."""
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES)
    code = (
        "import os, signal, sys; from pathlib import Path; from torchstone.storage import atomic; "
        "from torchstone.data.text import TextConfig; "
        "atomic.stage_hook = lambda s: os.kill(os.getpid(), signal.SIGKILL) if s == sys.argv[3] else None; "
        "corpus = {'kind': 'files', 'paths': sys.argv[1]}; "
        "TextConfig(corpus=corpus, tokenizer='bytes', length=16).build(Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache"), stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    source = build(path, tmp_path / "cache")
    assert source.shards.fingerprint == open_shards(folder).fingerprint
