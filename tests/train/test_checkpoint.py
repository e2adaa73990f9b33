"""P1, P2, P6, P7: what is saved is loaded bit for bit, the right step is chosen, nothing is lost on the way."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snapshots import assert_same, files_of, make_snapshot, write_manifest

from torchstone import __version__
from torchstone.errors import CheckpointError
from torchstone.train import checkpoint, manifest
from torchstone.train.checkpoint import CheckpointStore, Snapshot, read_checkpoint

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def store(tmp_path):
    """An empty store that keeps two."""
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def said(store):
    """What the store says."""
    lines: list[str] = []
    store.say = lines.append
    return lines


def _aside(store):
    return sorted(item.name for item in store.directory.iterdir() if ".set-aside-" in item.name)


def test_round_trip(store):
    snapshot = make_snapshot(7)
    path = store.save(snapshot)
    assert path == store.path(7) and path.name == "step-00000007"
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "optimizer.safetensors"]
    assert_same(store.load(), snapshot)
    assert_same(store.load(7), snapshot)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_keeps_its_bits(store, dtype):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8)
    tensor = raw > 127 if dtype == torch.bool else raw.view(dtype)  # NaNs and infinities among them
    store.save(Snapshot(1, {"model": {"x": tensor}}, {}))
    found = store.load().tensors["model"]["x"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_plain_data_keeps_its_value_and_type(tmp_path_factory, value):
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    store.save(Snapshot(0, {}, {"value": value}))
    found = store.load().data["value"]
    assert found == value and json.dumps(found, sort_keys=True) == json.dumps(value, sort_keys=True)


def test_views_transposes_and_shared_memory(store):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"a": base, "tied": base, "rows": base[1:3], "columns": base[:, 2:4], "turned": base.t()}
    store.save(Snapshot(1, {"model": tensors, "nothing": {}}, {}))
    assert_same(store.load(), Snapshot(1, {"model": tensors, "nothing": {}}, {}))


def test_parameters_are_stored_without_their_graph(store):
    parameter = torch.nn.Parameter(torch.ones(3))
    store.save(Snapshot(1, {"model": {"p": parameter}}, {}))
    assert not store.load().tensors["model"]["p"].requires_grad


def test_the_manifest_says_where_it_comes_from(store):
    store.save(make_snapshot(3))
    found = json.loads((store.path(3) / "manifest.json").read_text())
    assert found["step"] == 3 and found["torchstone"] == __version__ and found["torch"] == torch.__version__
    assert found["data"]["position"]["tokens"] == 300
    assert set(found["files"]) == {"model.safetensors", "optimizer.safetensors"}


def test_keep_deletes_the_oldest_steps_only(store):
    for step in (5, 10, 100_000_000, 200_000_001):
        store.save(make_snapshot(step))
    assert store.steps() == [100_000_000, 200_000_001]
    assert sorted(os.listdir(store.directory)) == ["latest", "step-100000000", "step-200000001"]
    assert store.latest() == 200_000_001


def test_an_empty_store(store, tmp_path):
    assert store.steps() == [] and store.latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint"):
        store.load()
    assert not store.directory.exists()


def test_a_step_that_is_not_there_is_named_with_those_that_are(store):
    store.save(make_snapshot(3))
    store.save(make_snapshot(6))
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there: 3, 6"):
        store.load(4)


def test_saving_a_step_again_changes_nothing(store, said):
    store.save(make_snapshot(3))
    before = files_of(store.directory)
    store.save(make_snapshot(3))
    assert files_of(store.directory) == before and said == []


def test_a_damaged_step_is_set_aside_and_saved_anew(store, said):
    store.save(make_snapshot(3))
    (store.path(3) / "model.safetensors").write_bytes(b"damaged")
    store.save(make_snapshot(3))
    assert_same(store.load(), make_snapshot(3))
    (aside,) = _aside(store)
    assert (store.directory / aside / "model.safetensors").read_bytes() == b"damaged"
    assert len(said) == 1 and aside in said[0]


def test_after_a_fallback_the_damaged_step_is_neither_preferred_nor_deleted(store, said):
    store = CheckpointStore(store.directory, keep=1, say=said.append)
    store.save(make_snapshot(10))
    shutil.copytree(store.path(10), store.directory / "copy")
    store.save(make_snapshot(20))
    (store.directory / "copy").rename(store.path(10))
    (store.path(20) / "model.safetensors").write_bytes(b"damaged")
    assert store.load(fallback=True).step == 10
    store.save(make_snapshot(15))
    assert store.steps() == [15]
    assert_same(store.load(), make_snapshot(15))
    (aside,) = _aside(store)
    assert aside.startswith("step-00000020.") and files_of(store.directory / aside)
    for step in (30, 40):
        store.save(make_snapshot(step))
    assert _aside(store) == [aside], "what was set aside is never deleted"


def test_leftovers_of_crashes_are_cleared_and_nothing_else(store):
    store.save(make_snapshot(1))
    store.save(make_snapshot(2))
    (store.path(1) / "manifest.json").unlink()  # a deletion that was cut short
    for name in ("step-00000009.partial-999999999-ab", "latest.partial-999999999-ab", f"x.partial-{os.getpid()}-ab"):
        (store.directory / name).mkdir()
    (store.directory / "notes.txt").write_text("mine")
    assert store.steps() == [2]
    store.save(make_snapshot(3))
    names = sorted(os.listdir(store.directory))
    assert names == ["latest", "notes.txt", "step-00000002", "step-00000003", f"x.partial-{os.getpid()}-ab"]


def test_a_crash_before_latest_moves_is_no_damage(store):
    store.save(make_snapshot(1))
    pointer = (store.directory / "latest").read_bytes()
    store.save(make_snapshot(2))
    (store.directory / "latest").write_bytes(pointer)
    assert store.load().step == 2
    (store.directory / "latest").unlink()
    assert store.load().step == 2


def test_a_newer_schema_says_which_version_wrote_it(store):
    store.save(make_snapshot(1))
    write_manifest(store.path(1), 1, schema=99, torchstone="7.1.0")
    with pytest.raises(CheckpointError) as caught:
        store.load()
    assert all(word in str(caught.value) for word in ("schema 99", "'7.1.0'", __version__, "schema 1"))


def test_a_renamed_folder_is_refused(store):
    store.save(make_snapshot(1))
    store.path(1).rename(store.path(5))
    with pytest.raises(CheckpointError, match="of step 1, its folder of another"):
        read_checkpoint(store.path(5))


def test_a_bad_group_name_is_a_programmers_mistake(store):
    with pytest.raises(AssertionError):
        store.save(Snapshot(1, {"../model": {}}, {}))
    with pytest.raises(AssertionError):
        CheckpointStore(store.directory, keep=0)


@pytest.mark.parametrize("data", [{"loss": float("nan")}, {"object": object()}])
def test_data_that_is_not_plain_is_refused_before_anything_is_kept(store, data):
    store.save(make_snapshot(1))
    with pytest.raises((TypeError, ValueError)):
        store.save(Snapshot(2, {}, data))
    assert sorted(os.listdir(store.directory)) == ["latest", "step-00000001"]


def test_space_is_checked_for_all_that_will_be_kept(store, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10_000, 0, 3_000))
    store.check_space(1_000)
    with pytest.raises(CheckpointError, match=r"3e-06 GB free.*checkpoint\.keep"):
        store.check_space(1_001)
    store.save(make_snapshot(1))
    store.check_space(1_500)  # one is there already; two more must fit
    store.save(make_snapshot(2))
    store.check_space(3_000)
    with pytest.raises(CheckpointError):
        store.check_space(3_001)


def test_a_header_of_many_tensors_is_read(store):
    tensors = {f"layer{index}.weight": torch.zeros(1) for index in range(3000)}
    store.save(Snapshot(1, {"model": tensors}, {}))
    assert len(store.load().tensors["model"]) == 3000


def test_what_is_written_is_never_too_large_to_be_read(store, monkeypatch):
    monkeypatch.setattr(manifest, "LARGEST_MANIFEST", 1000)
    store.save(make_snapshot(1))
    with pytest.raises(CheckpointError, match="manifest of [0-9]{4} bytes"):
        store.save(Snapshot(2, {}, {"history": "x" * 2000}))
    monkeypatch.setattr(manifest, "MOST_TENSORS", 10)
    with pytest.raises(CheckpointError, match="more than 10"):
        store.save(Snapshot(2, {"model": {str(index): torch.zeros(1) for index in range(11)}}, {}))
    assert store.load().step == 1 and store.steps() == [1]


def test_the_default_warning_goes_to_stderr(tmp_path, capsys):
    store = CheckpointStore(tmp_path)
    store.save(make_snapshot(1))
    store.save(make_snapshot(2))
    (store.path(2) / "model.safetensors").unlink()
    assert store.load(fallback=True).step == 1
    assert "WARNING" in capsys.readouterr().err


def test_protected_steps_are_never_deleted(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, protected=(2, 4, 12))
    for step in range(1, 8):
        store.save(make_snapshot(step))
    assert store.steps() == [2, 4, 6, 7]
    assert_same(store.load(2), make_snapshot(2))
    assert store.latest() == 7


def test_room_is_kept_for_protected_steps(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 4 * 10**9))
    CheckpointStore(tmp_path / "checkpoints", keep=2, protected=(4, 12)).check_space(10**9)
    with pytest.raises(
        CheckpointError, match=r"keeping 4 checkpoints \(2 and 2 ends of decays or cycles\) of 1 GB, and"
    ):
        CheckpointStore(tmp_path / "checkpoints", keep=2, protected=(4, 8, 12)).check_space(10**9)


def test_ends_before_a_branch_begins_need_no_room(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, protected=(*range(1, 20), 24))
    store.save(make_snapshot(20))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * 10**9))
    store.check_space(10**9)  # one is there, one more is kept, and one while saving
    with pytest.raises(CheckpointError, match="keeping 2 checkpoints of 2 GB, .* lower checkpoint.keep"):
        store.check_space(2 * 10**9)
