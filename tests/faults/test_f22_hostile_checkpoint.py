"""F22: checkpoints made to harm: refused with a reason, in less than two seconds, and no code of theirs runs (P5).

The attacker knows the format: manifest and hashes are right in every case, unless the case is about them.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import struct
import time

import pytest
import torch
from safetensors.torch import load_file
from snapshots import assert_same, files_of, make_snapshot, write_manifest

from torchstone.errors import CheckpointError
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.manifest import LARGEST_MANIFEST, check_header, read_manifest

MODEL = "model.safetensors"
SECONDS = 2.0


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


@pytest.fixture
def canary(tmp_path):
    """A path that exists once hostile code has run."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "hostile code ran"


@pytest.fixture
def store(tmp_path):
    """Step 1 good, step 2 to be made hostile."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 2):
        store.save(make_snapshot(step))
    return store


def assert_refused(store, *words):
    """Refused with these words within two processor seconds; `fallback` uses the good step; no file changes."""
    before = files_of(store.directory)
    gc.freeze()  # what other tests of this process left behind is not the store's to search for garbage
    begun = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        store.load()
    seconds = time.process_time() - begun
    gc.unfreeze()
    assert seconds < SECONDS
    text = str(caught.value)
    assert "step-00000002" in text and len(text) < 1500
    assert all(word in text for word in words), text
    assert_same(store.load(fallback=True, say=lambda line: None), make_snapshot(1))
    assert files_of(store.directory) == before


def test_f22_the_canary_would_fire(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "x")))
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_f22_pickle_in_place_of_safetensors(store, canary, protocol):
    (store.path(2) / MODEL).write_bytes(pickle.dumps(Payload(canary), protocol=protocol))
    write_manifest(store.path(2), 2)
    assert_refused(store, MODEL, "refused" if protocol < 2 else "pickle")


@pytest.mark.parametrize("zipped", [True, False])
def test_f22_torch_save_in_place_of_safetensors(store, canary, zipped):
    torch.save({"w": Payload(canary)}, store.path(2) / MODEL, _use_new_zipfile_serialization=zipped)
    write_manifest(store.path(2), 2)
    assert_refused(store, MODEL, "pickle", "can run code")


@pytest.mark.parametrize("beside", ["nothing", "everything"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_f22_distributed_checkpoint(store, canary, name, beside):
    if beside == "nothing":
        for item in store.path(2).iterdir():
            item.unlink()
    (store.path(2) / name).write_bytes(pickle.dumps(Payload(canary)))
    assert_refused(store, "torch.distributed.checkpoint", "can run code", "refused")


def safetensors(header, data=b"", length=None):
    """A file with this header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


D = bytes(16)
HEADERS = {
    "empty file": b"",
    "seven bytes": b"\x01" * 7,
    "length beyond the file": safetensors({"a": entry()}, D, length=10**9),
    "length of 2^64 - 1": b"\xff" * 8 + D,
    "length zero": safetensors(b"", D),
    "not JSON": safetensors(b"x" * 32, D),
    "invalid UTF-8": safetensors(b'{"\xff": 1}', D),
    "a list": safetensors([1, 2], D),
    "deep": safetensors(b"[" * 100_000, D),
    "deep under a name": safetensors(b'{"a":' * 100_000, D),
    "negative start": safetensors({"a": entry(-16, 0)}, D),
    "negative end": safetensors({"a": entry(0, -16)}, D),
    "end before start": safetensors({"a": entry(16, 0)}, D),
    "beyond the end": safetensors({"a": entry(16, 32)}, D),
    "overlap": safetensors({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
    "the same bytes twice": safetensors({"a": entry(), "b": entry()}, D),
    "hole": safetensors({"a": entry(16, 32)}, bytes(32)),
    "bytes left over": safetensors({"a": entry()}, bytes(32)),
    "shape too large": safetensors({"a": entry(shape=(5,))}, D),
    "shape that overflows": safetensors({"a": entry(shape=(2**63, 2))}, D),
    "shape that overflows to fit": safetensors({"a": entry(shape=(2**62 + 1, 4))}, D),
    "negative shape": safetensors({"a": entry(shape=(-4,))}, D),
    "other type's size": safetensors({"a": entry(dtype="F64")}, D),
    "unknown type": safetensors({"a": entry(dtype="PICKLE")}, D),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [4]}}, D),
    "three offsets": safetensors({"a": {**entry(), "data_offsets": [0, 8, 16]}}, D),
    "offsets as text": safetensors({"a": {**entry(), "data_offsets": ["0", "16"]}}, D),
    "offsets beyond 64 bits": safetensors({"a": entry(0, 10**30)}, D),
    "millions of lists": safetensors(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}", D),
    "entry is no mapping": safetensors({"a": 3}, D),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_f22_hostile_tensor_file(store, canary, content):
    (store.path(2) / MODEL).write_bytes(content)
    write_manifest(store.path(2), 2)
    assert_refused(store, MODEL, "no valid safetensors file")


def test_f22_header_of_100_megabytes(store):
    (store.path(2) / MODEL).write_bytes(safetensors(b'{"a":"' + b" " * (100 << 20) + b'"}', D))
    write_manifest(store.path(2), 2)
    assert_refused(store, MODEL, "header of 104857608 bytes")


@pytest.mark.parametrize("length", [0, 1, 2**40 - 8])
def test_f22_sparse_file_without_a_possible_header(tmp_path, length):
    """A terabyte that takes no space on the disk: refused by the length of its header, not read."""
    path = tmp_path / MODEL
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match=f"a header of {length} bytes"):
        check_header(path)


@pytest.mark.parametrize("length", [0x80, 0x380, 0x4B50])
def test_a_header_whose_length_reads_like_a_pickle_is_accepted(tmp_path, length):
    """128 is the first byte of a pickle, and 0x4B50 the `PK` of a zip: both are lengths that a good file may have."""
    path = tmp_path / MODEL
    header = json.dumps({"a": entry()}).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", length) + header + D)
    check_header(path)
    assert load_file(path)["a"].shape == (4,)


def test_f22_header_of_a_hundred_thousand_entries(store):
    many = {f"t{number}": entry(number * 4, number * 4 + 4, (1,)) for number in range(100_001)}
    (store.path(2) / MODEL).write_bytes(safetensors(many, bytes(4 * 100_001)))
    write_manifest(store.path(2), 2)
    assert_refused(store, MODEL, "more than 100000")


PATHS = [
    "../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "model.safetensors/../x.safetensors",
    "model\x00.safetensors", "C:\\model.safetensors", "model.pkl", "model.json", ".metadata", "manifest.json",
    "x" * 300 + ".safetensors", "model.safetensors\n", "MODEL.safetensors", "mödel.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_f22_path_traversal_in_the_manifest(store, tmp_path, name):
    (tmp_path / "outside.safetensors").write_bytes((store.path(2) / MODEL).read_bytes())
    files = json.loads((store.path(2) / "manifest.json").read_text())["files"]
    write_manifest(store.path(2), 2, files={**files, name: files[MODEL]})
    assert_refused(store, "manifest.json", "which no checkpoint of torchstone holds")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": []},
        {"files": {MODEL: 3}},
        {"files": {MODEL: {"bytes": "3", "xxh3": "0"}}},
        {"files": {MODEL: {"bytes": 3}}},
        {"step": "2"},
        {"step": None},
        {"step": [2]},
        {"data": None},
        {"data": "x"},
    ],
    ids=str,
)
def test_f22_manifest_of_another_form(store, changes):
    write_manifest(store.path(2), 2, **changes)
    assert_refused(store, "not a manifest that torchstone wrote")


@pytest.mark.parametrize("step", [1, 3, -2, 10**30, True])
def test_f22_manifest_of_another_step(store, step):
    write_manifest(store.path(2), 2, step=step)
    assert_refused(store, "manifest.json")


MANIFESTS = {
    "not JSON": b"\x80\x04pickle",
    "a list": b"[]\n",
    "a number": b"1\n",
    "null": b"null\n",
    "deep": b"[" * 1_000_000,
    "deep mapping": b'{"a":' * 500_000,
    "not a number": b'{"schema":NaN,"self":""}\n',
    "infinite": b'{"schema":1e999,"self":""}\n',
    "a huge number": b'{"schema":' + b"9" * 100_000 + b"}\n",
    "a lone surrogate": b'{"schema":"\\ud800","self":""}\n',
    "many empty lists": b'{"a":[' + b"[]," * 1_300_000 + b"[]]}\n",
    "too large": b" " * (LARGEST_MANIFEST + 1),
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_f22_hostile_manifest(store, content):
    (store.path(2) / "manifest.json").write_bytes(content)
    assert_refused(store, "manifest.json")


def test_f22_sparse_manifest(store):
    os.truncate(store.path(2) / "manifest.json", 2**40)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="more than any manifest"):
        read_manifest(store.path(2))
    assert time.monotonic() - begun < SECONDS


def test_f22_manifest_with_a_key_twice(store):
    path = store.path(2) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'{"data"', b'{"data":{},"data"', 1))
    assert_refused(store, "manifest.json", "does not match its own hash")


@pytest.mark.parametrize("name", [MODEL, "manifest.json"])
def test_f22_pipe_in_place_of_a_file(store, name):
    """Reading it would wait for ever."""
    (store.path(2) / name).unlink()
    os.mkfifo(store.path(2) / name)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=name):
        store.load()
    assert time.monotonic() - begun < SECONDS


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", ".."])
def test_f22_links_out_of_the_folder(store, target):
    (store.path(2) / MODEL).unlink()
    (store.path(2) / MODEL).symlink_to(target)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="not a regular file"):
        store.load()
    assert time.monotonic() - begun < SECONDS


def test_f22_pointer_to_another_place(store, tmp_path):
    (store.directory / "latest").unlink()
    (store.directory / "latest").symlink_to("/dev/zero")
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="latest is damaged"):
        store.load()
    assert time.monotonic() - begun < SECONDS


def test_f22_hostile_names_do_not_reach_the_terminal_as_they_are(store):
    files = json.loads((store.path(2) / "manifest.json").read_text())["files"]
    write_manifest(store.path(2), 2, files={**files, "\x1b[2J\u202e": files[MODEL]})
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)
