"""F7: one flipped bit anywhere in a checkpoint is always detected, and the file named (P2).

$TORCHSTONE_FAULT_TRIALS sets the number of random offsets (500 for the published figure).
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from snapshots import assert_same
from torch import nn

from torchstone.errors import CheckpointError
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.state import optimizer_tensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A store with the checkpoint of a small model and its optimizer after two updates, and its snapshot."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.LayerNorm(64))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.arange(64)).square().mean().backward()
        optimizer.step()
    tensors, plain = optimizer_tensors(optimizer)
    position = {"step": 2, "tokens": 128, "seconds": 0.25}
    data = json.loads(json.dumps({"optimizer": plain, "position": position}))
    snapshot = Snapshot(2, {"model": dict(model.state_dict()), "optimizer": tensors}, data)
    store = CheckpointStore(tmp_path_factory.mktemp("f07") / "checkpoints")
    store.save(snapshot)
    return store, snapshot


def flip(path, offset, bit):
    """Flip one bit of a file; doing it again undoes it."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def undetected(store, path, places):
    """Those of the (offset, bit) places whose flip is not detected, or blamed on another file."""
    missed = []
    for offset, bit in places:
        flip(path, offset, bit)
        try:
            store.load()
            missed.append((path.name, offset, bit, "loaded"))
        except CheckpointError as error:
            if not str(error).startswith(f"{path} "):
                missed.append((path.name, offset, bit, str(error)))
        flip(path, offset, bit)
    return missed


def files(store):
    """Every file of the checkpoint, and the pointer to it."""
    return [*sorted(store.path(2).iterdir()), store.directory / "latest"]


def test_f07_random_bits_of_all_files(saved, trials, capsys):
    """Files are drawn alike, so that the small ones are not spared; offsets and bits uniformly."""
    store, snapshot = saved
    generator = random.Random(7)
    count = {path: 0 for path in files(store)}
    missed = []
    for _ in range(trials(60)):
        path = generator.choice(files(store))
        place = (generator.randrange(path.stat().st_size), generator.randrange(8))
        missed += undetected(store, path, [place])
        count[path] += 1
    drawn = ", ".join(f"{path.name} {number}" for path, number in count.items())
    with capsys.disabled():
        print(f"\nF7: {sum(count.values())} flipped bits ({drawn}), undetected or misnamed: {len(missed)}")
    assert missed == []
    assert_same(store.load(), snapshot)


@pytest.mark.parametrize("name", ["manifest.json", "latest"])
def test_f07_every_byte_of_the_small_files(saved, name):
    store, snapshot = saved
    (path,) = [path for path in files(store) if path.name == name]
    generator = random.Random(8)
    places = [(offset, generator.randrange(8)) for offset in range(path.stat().st_size)]
    assert undetected(store, path, places) == []
    assert_same(store.load(), snapshot)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_f07_header_and_first_and_last_bytes_of_tensor_files(saved, name):
    store, snapshot = saved
    path = store.path(2) / name
    size = path.stat().st_size
    places = [(offset, offset % 8) for offset in [*range(40), size // 2, size - 2, size - 1]]
    assert undetected(store, path, places) == []
    assert_same(store.load(), snapshot)
