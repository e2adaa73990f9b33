"""The loss store: blocks whole or absent, rows by window, damage found, other data refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchstone.data.loss_store import (
    HEADER,
    MANIFEST,
    Header,
    LossStore,
    LossStoreWriter,
    block_path,
    read_block,
    write_block,
)
from torchstone.errors import ConfigError, DataError

WINDOWS, LENGTH, ROWS = 23, 5, 4


def header(**changes: Any) -> Header:
    settings: dict[str, Any] = {
        "data": "d1", "tokenizer": "t1", "reference": {"model": "runs/a", "weights": "w1"}, "windows": WINDOWS,
        "length": LENGTH, "rows": ROWS, "dtype": "float16",
    }  # fmt: skip
    return Header(**{**settings, **changes})


def losses() -> np.ndarray:
    return np.random.default_rng(0).gamma(2.0, 1.5, (WINDOWS, LENGTH)).astype(np.float32)


def filled(path: Path, **changes: Any) -> LossStore:
    writer = LossStoreWriter(path, header(**changes))
    for block in writer.missing():
        writer.write(block, losses()[list(writer.header.span(block))])
    return writer.finish()


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2.0**-11), ("float32", 0.0)])
def test_rows_are_found_by_window_within_the_stated_rounding(tmp_path: Path, dtype: str, bound: float) -> None:
    store = filled(tmp_path / "store", dtype=dtype)
    windows = np.asarray([22, 0, 7, 7, 3, 19])
    found, wanted = store.losses(windows), losses()[windows]
    assert found.dtype == np.float32 and found.shape == (6, LENGTH)
    assert (np.abs(found - wanted) <= bound * wanted).all()
    assert np.abs(found - wanted)[(wanted >= 2) & (wanted < 4)].max(initial=0) <= 0.001


def test_a_store_continues_where_it_was_cut_and_ends_the_same(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole")
    part = LossStoreWriter(tmp_path / "part", header())
    for block in (0, 3):
        part.write(block, losses()[list(part.header.span(block))])
    with pytest.raises(DataError, match="2 of 6 blocks are there"):
        LossStore(tmp_path / "part")
    again = LossStoreWriter(tmp_path / "part", header())
    assert again.missing() == [1, 2, 4, 5]
    continued = filled(tmp_path / "part")
    assert continued.fingerprint == whole.fingerprint
    for block in range(whole.header.blocks):
        assert block_path(whole.path, block).read_bytes() == block_path(continued.path, block).read_bytes()


@pytest.mark.parametrize("stage", ["file opened", "file written", "file flushed", "file renamed"])
def test_a_kill_at_any_stage_leaves_whole_blocks(tmp_path: Path, stage: str) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from torchstone.storage import atomic
import test_loss_store as here
count = 0
def hook(stage):
    global count
    count += stage == {stage!r}
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
atomic.stage_hook = hook
here.filled(Path(sys.argv[1]))
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "store")], env={**os.environ}, check=False)
    assert ended.returncode == -signal.SIGKILL
    writer = LossStoreWriter(tmp_path / "store", header())
    assert 3 <= len(writer.missing()) <= 5
    assert filled(tmp_path / "store").fingerprint == filled(tmp_path / "whole").fingerprint


@pytest.mark.parametrize("at", [0, 13, -1])
def test_damage_is_found_at_the_first_read_and_mended_by_scoring_again(tmp_path: Path, at: int) -> None:
    store = filled(tmp_path / "store")
    path = block_path(store.path, 2)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))
    damaged = LossStore(store.path)
    assert damaged.losses(np.asarray([0, 20])).shape == (2, LENGTH)  # other blocks are read
    for read in (lambda: damaged.losses(np.asarray([9])), damaged.verify):
        with pytest.raises(DataError, match="block-00000002 does not have the content"):
            read()
    assert LossStoreWriter(store.path, header()).missing() == [2]
    assert filled(store.path).fingerprint == store.fingerprint
    LossStore(store.path).verify()


def test_a_block_of_another_store_is_found(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    write_block(block_path(store.path, 1), np.zeros((ROWS, LENGTH), dtype="<f2"))  # intact, but not what was written
    with pytest.raises(DataError, match="block-00000001"):
        LossStore(store.path).losses(np.asarray([5]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "d2"}, "another data source: d1 there, d2 now"),
        ({"tokenizer": "t2"}, "another tokenizer"),
        ({"reference": {"model": "runs/a", "weights": "w2"}}, "another reference .*: w1 there, w2 now"),
        ({"dtype": "float32"}, "another precision"),
        ({"windows": 24}, "another windows: 23"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    filled(tmp_path / "store")
    with pytest.raises(ConfigError, match=words):
        LossStoreWriter(tmp_path / "store", header(**changes))


def test_a_reference_that_moved_is_the_same(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    moved = header(reference={"model": "elsewhere/a", "weights": "w1"})
    assert LossStoreWriter(tmp_path / "store", moved).missing() == []


def test_finishing_again_under_another_name_of_the_reference_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    before = {path.name: path.read_bytes() for path in store.path.iterdir()}
    again = filled(store.path, reference={"model": "../elsewhere/a", "weights": "w1"})
    assert {path.name: path.read_bytes() for path in store.path.iterdir()} == before
    assert again.header.reference["model"] == "runs/a"
    other = filled(tmp_path / "other", reference={"model": "elsewhere/a", "weights": "w1"})
    assert other.fingerprint == again.fingerprint == store.fingerprint
    assert filled(tmp_path / "third", reference={"model": "runs/a", "weights": "w2"}).fingerprint != store.fingerprint


def test_reading_keeps_no_file_open(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    store = LossStore(tmp_path / "store")
    before = set(os.listdir("/proc/self/fd"))
    assert (store.losses(np.arange(WINDOWS)) == losses().astype("f2")).all()
    assert set(os.listdir("/proc/self/fd")) == before and "store" not in Path("/proc/self/maps").read_text()


def test_a_block_that_shrinks_after_it_was_checked_is_found(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    store.losses(np.asarray([4, 7]))
    path = block_path(store.path, 1)
    path.write_bytes(path.read_bytes()[:LENGTH])
    with pytest.raises(DataError, match="block-00000001 is shorter"):
        store.losses(np.asarray([7]))
    path.unlink()
    with pytest.raises(DataError, match="block-00000001"):
        store.losses(np.asarray([7]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("windows", 0), ("windows", "23"), ("length", -5), ("rows", 0), ("rows", 2.5), ("rows", True), ("dtype", "float8"),
        ("dtype", []), ("reference", None), ("data", 7), ("tokenizer", None), ("surplus", 1),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_damage(tmp_path: Path, name: str, value: Any) -> None:
    store = filled(tmp_path / "store")
    content = json.loads((store.path / HEADER).read_text())
    (store.path / HEADER).write_text(json.dumps({**content, name: value}))
    with pytest.raises(DataError, match=f"is damaged: {HEADER}: .*{name}"):
        LossStore(store.path)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds files that are no loss store"):
        LossStoreWriter(tmp_path, header())
    with pytest.raises(DataError, match="is no loss store"):
        LossStore(tmp_path)


@pytest.mark.parametrize("name", [HEADER, MANIFEST])
def test_damaged_text_is_found(tmp_path: Path, name: str) -> None:
    store = filled(tmp_path / "store")
    path = store.path / name
    path.write_text(path.read_text().replace("t1", "t9"))
    with pytest.raises(DataError, match="damaged"):
        LossStore(store.path)
    path.write_text("{")
    with pytest.raises(DataError, match=name):
        LossStore(store.path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_a_loss_that_cannot_be_held_names_its_place(tmp_path: Path, value: float) -> None:
    writer = LossStoreWriter(tmp_path / "store", header())
    rows = losses()[4:8]
    rows[2, 3] = value
    with pytest.raises(DataError, match="target 3 of window 6"):
        writer.write(1, rows)
    assert 1 in writer.missing()


def test_blocks_hold_their_bytes_and_hash(tmp_path: Path) -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    write_block(tmp_path / "b", array)
    found = read_block(tmp_path / "b", (2, 3), "<f4")
    assert found is not None and (found == array).all()
    assert read_block(tmp_path / "b", (3, 3), "<f4") is None
    assert read_block(tmp_path / "absent", (2, 3), "<f4") is None


def test_the_header_says_whose_losses_these_are(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    assert json.loads((store.path / HEADER).read_text())["reference"] == {"model": "runs/a", "weights": "w1"}
    assert (store.header.data, store.header.tokenizer, store.header.blocks) == ("d1", "t1", 6)
