"""The chunked loss never needs the memory of all logits, nor leaves freed chunks that cannot be used again."""

from __future__ import annotations

import os
import subprocess
import sys

TOKENS, VOCAB, WIDTH = 4096, 16384, 512

SCRIPT = f"""
import resource
import torch
from torchstone.objectives.next_token import chunked_cross_entropy

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
hidden_nd = torch.randn({TOKENS}, {WIDTH}, generator=draw).requires_grad_()
weight_vd = torch.randn({VOCAB}, {WIDTH}, generator=draw).requires_grad_()
targets_n = torch.randint({VOCAB}, ({TOKENS},), generator=draw)
chunked_cross_entropy(hidden_nd[:8], weight_vd, targets_n[:8])[0].backward()
before = peak()
chunked_cross_entropy(hidden_nd, weight_vd, targets_n)[0].backward()
print(peak() - before)
"""


def test_peak_memory_is_a_fraction_of_all_logits():
    """All logits once, in fp32, are 256 MiB, and plain cross entropy holds them about three times."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    added, logits = int(done.stdout), TOKENS * VOCAB * 4
    assert added < 0.5 * logits, f"{added / 2**20:.0f} MiB"
    print(f"{added / 2**20:.0f} MiB")
