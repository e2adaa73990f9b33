"""Small checkpoints, with the means to damage them, for tests of storage."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchstone.storage.hashing import bytes_hash, canonical_json, file_hash
from torchstone.train.checkpoint import Snapshot
from torchstone.train.manifest import MANIFEST, manifest_bytes


def make_snapshot(step: int, width: int = 8) -> Snapshot:
    """Model-like and optimizer-like tensors of several types, different for each step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(width, width, generator=generator)
    return Snapshot(
        step,
        {
            "model": {
                "weight": weight,
                "tied": weight,
                "half": weight.bfloat16(),
                "scalar": torch.tensor(0.5),
            },
            "optimizer": {
                "0.exp_avg": weight * 2,
                "0.step": torch.tensor(float(step)),
                "empty": torch.empty(0, 3),
            },
        },
        {
            "position": {"step": step, "tokens": step * 100},
            "seed": 0,
            "rate": 0.1,
            "name": "λ",
            "betas": [0.9, 0.95],
        },
    )


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    """Equal bit for bit: names, shapes, types, values, data."""
    assert found.step == expected.step
    assert found.data == expected.data
    assert found.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            other = found.tensors[group][name]
            assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


def files_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the hash of its content."""
    return {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def run_in_child(action: Callable[[], Any]) -> int:
    """Exit status of a forked child that runs `action`: 0, a code it left with, or 99 after an exception."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_manifest(folder: Path, number: int, /, **changes: Any) -> None:
    """A manifest with right hashes for whatever the folder holds, as somebody hostile would write it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    body = _body(manifest_bytes(folder, number, {"position": {"step": number}})) | changes
    (folder / MANIFEST).write_bytes(canonical_json({**body, "self": bytes_hash(canonical_json(body))}) + b"\n")


def _body(manifest: bytes) -> dict[str, Any]:
    import json

    body = json.loads(manifest)
    del body["self"]
    return body
