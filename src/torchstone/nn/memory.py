"""How much memory a device has, for parts that refuse work that cannot fit."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


@cache
def device_bytes(device: torch.device) -> int:
    """Bytes of memory of the GPU, or of this machine (of its control group, where that is less)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(CONTROL_GROUP.read_text()))
    except (OSError, ValueError):
        return total
