"""Speed of gradient spectra in factored form, against singular values of the full gradient.

    python benchmarks/layer_gradients.py [--rounds 12] [--json PATH]

One thread, fp32, one gradient G = Δᵀ X of a d × d projection over T tokens at a time, the three ways in turns: ours from the
factors; `torch.linalg.svdvals` of the full matrix; and the full decomposition with U and V, as the authors' code has it. The
peers are given G ready made. Processor time of the thread is measured, which other processes do not lengthen, each time after
a call that is not measured. Nuclear norms are compared with fp64 values of the full matrix. Goals: at least 50 times svdvals
at d = 512, T = 64, and 150 times at d = 1536, T = 128, with a relative error of at most 1e-5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchstone.diagnose.gradients.spectra import gradient_singular_values

CASES = ((512, 64, 50.0), (1536, 128, 150.0))
ERROR = 1e-5
INNER = 50  # our calls per round


def factors(width: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs with a common direction and output gradients whose sizes span three decades, as in trained models."""
    draw = torch.Generator().manual_seed(width)
    x_td = torch.randn(tokens, width, generator=draw) + 2 * torch.randn(1, width, generator=draw)
    delta_td = torch.randn(tokens, width, generator=draw) * torch.logspace(0, -3, tokens)[:, None]
    return x_td, delta_td


def milliseconds(action: Callable[[], object], repetitions: int = 1) -> float:
    """Milliseconds of this thread's processor time for one call, mean over repetitions, after one that warms the caches."""
    action()
    started = time.thread_time()
    for _ in range(repetitions):
        action()
    return 1000 * (time.thread_time() - started) / repetitions


def measure(width: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way, the median ratios of neighbouring measurements, and our error."""
    x_td, delta_td = factors(width, tokens)
    full = delta_td.T @ x_td
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "ours": (lambda: gradient_singular_values(x_td, delta_td), INNER),
        "svdvals": (lambda: torch.linalg.svdvals(full), 1),
        "full svd": (lambda: torch.linalg.svd(full, full_matrices=False), 1),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (action, repetitions) in ways.items():
            found[name].append(milliseconds(action, repetitions))
    exact = torch.linalg.svdvals(delta_td.double().T @ x_td.double()).sum()
    ours = gradient_singular_values(x_td, delta_td).double().sum()
    result = {name: statistics.median(times) for name, times in found.items()}
    for peer in ("svdvals", "full svd"):
        pairs = zip(found[peer], found["ours"], strict=True)
        result[f"{peer} / ours"] = statistics.median(theirs / mine for theirs, mine in pairs)
    return result | {"error": abs(float(ours / exact) - 1)}


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    report, reached = {}, True
    for width, tokens, goal in CASES:
        found = measure(width, tokens, given.rounds if width < 1000 else max(3, given.rounds // 4))
        report[f"d = {width}, T = {tokens}"] = found
        print(
            f"d = {width}, T = {tokens}: ours {found['ours']:.2f} ms, svdvals {found['svdvals']:.1f} ms "
            f"({found['svdvals / ours']:.0f}x, goal {goal:.0f}x), full SVD {found['full svd']:.1f} ms "
            f"({found['full svd / ours']:.0f}x); error of the nuclear norm {found['error']:.1e} (goal {ERROR:.0e})"
        )
        reached &= found["svdvals / ours"] >= goal and found["error"] <= ERROR
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
