"""Frequency usage and the constructed heads equal the reference vectors of p-RoPE: every `usage/*` and `head/*` entry.

Sizes, amplitudes and lengths are read from the file. Planned tolerance: 1e-5.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from torchstone.diagnose.rotary.frequency_usage import pair_norms
from torchstone.diagnose.rotary.theory import constructed_attention

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TORCHSTONE_REFERENCE", ROOT.parent / "shared" / "reference"))
FILE = FOLDER / "p-rope.npz"
TOLERANCE = 1e-5
BACK = {"diag": 0, "prev": 1}

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"reference vectors are absent: {FILE}")


def _vectors() -> dict[str, np.ndarray]:
    if not FILE.exists():
        return {}
    with np.load(FILE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


VECTORS = _vectors()
USAGE = sorted(name for name in VECTORS if name.startswith("usage/"))
TURNED = sorted(name for name in VECTORS if name.endswith("_rot"))
HEADS = [
    (kind, index)
    for kind in sorted(name.removeprefix("head/") for name in VECTORS if name.startswith("head/"))
    if kind not in ("amp", "g")
    for index in range(len(VECTORS["head/amp"]))
]


def test_every_entry_is_compared() -> None:
    assert USAGE and all(name.endswith("_norm") for name in USAGE)
    assert {f"usage/{name.rpartition('/')[2].removesuffix('_rot')}_norm" for name in TURNED} <= set(USAGE)
    assert TURNED and HEADS and {kind for kind, _ in HEADS} <= set(BACK)


@pytest.mark.parametrize("name", USAGE)
def test_usage(name: str) -> None:
    source = name.removeprefix("usage/").removesuffix("_norm")
    x_bhtd = torch.from_numpy(VECTORS[source]).transpose(1, 2)
    ours = pair_norms(x_bhtd).mean(dim=(0, 2)).numpy()
    assert ours.shape == VECTORS[name].shape
    np.testing.assert_allclose(ours, VECTORS[name], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("key", TURNED)
def test_usage_is_the_same_after_rotation(key: str) -> None:
    ours = pair_norms(torch.from_numpy(VECTORS[key]).transpose(1, 2)).mean(dim=(0, 2)).numpy()
    theirs = VECTORS[f"usage/{key.rpartition('/')[2].removesuffix('_rot')}_norm"]
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kind", "index"), HEADS)
def test_constructed_heads(kind: str, index: int) -> None:
    theirs = VECTORS[f"head/{kind}"][index]
    frequencies = np.atleast_1d(VECTORS["head/g"]).tolist()
    ours = constructed_attention(float(VECTORS["head/amp"][index]), frequencies, theirs.shape[0], BACK[kind])
    np.testing.assert_allclose(ours.numpy(), theirs, atol=TOLERANCE, rtol=0)
