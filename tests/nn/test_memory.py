"""How much memory a device is said to have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchstone.nn import memory
from torchstone.nn.memory import device_bytes

CPU = torch.device("cpu")


def test_a_control_group_bounds_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = device_bytes.__wrapped__(CPU)
    assert whole > 1e8
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTROL_GROUP", limit)
    limit.write_text("12345678\n")
    assert device_bytes.__wrapped__(CPU) == 12345678
    limit.write_text("max\n")
    assert device_bytes.__wrapped__(CPU) >= whole
