"""Shared by the fault tests: a zygote, how many random trials to make, and the hash of a run's weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from zygote import Zygote

from torchstone.storage.hashing import file_hash
from torchstone.train.checkpoint import CheckpointStore


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """A scratch folder in memory where there is one: killed processes lose nothing there either, and flushing is free."""
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="torchstone-", dir=root)


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """A folder in memory for one test."""
    with in_memory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def memory_path() -> Iterator[Path]:
    """A folder in memory for all tests of a module."""
    with in_memory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A process from which training children are forked."""
    process = Zygote(tmp_path_factory.mktemp("zygote") / "log.txt")
    yield process
    process.close()


@pytest.fixture(scope="session")
def trials() -> Callable[[int], int]:
    """Number of random trials: the default, or $TORCHSTONE_FAULT_TRIALS for a long run."""
    return lambda default: int(os.environ.get("TORCHSTONE_FAULT_TRIALS", default))


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], str]:
    """Hash of the newest checkpoint's model file, after the whole checkpoint was verified."""

    def hash_of(directory: Path) -> str:
        store = CheckpointStore(directory / "checkpoints")
        step = store.load().step
        return file_hash(store.path(step) / "model.safetensors")

    return hash_of
