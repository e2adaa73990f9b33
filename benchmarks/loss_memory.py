"""Memory and time of the chunked next-token loss against cross entropy on all logits at once, forward and backward.

    python benchmarks/loss_memory.py [--repetitions 3] [--threads N] [--json PATH]

32k tokens of vocabulary, 8k tokens in the batch, width 512, fp32. Every measurement is a process of its own, since the
peak of a process never falls; the peak of one that only makes the inputs and gradients is subtracted. Goal: the
chunked loss needs at most a quarter of the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

VOCAB, TOKENS, WIDTH = 32768, 8192, 512
GOAL = 0.25
CASES = ("baseline", "plain", "chunked")


def measure(case: str, threads: int) -> dict[str, float]:
    """Peak bytes and seconds of one case, in this process."""
    import torch
    import torch.nn.functional as F

    from torchstone.objectives.next_token import chunked_cross_entropy

    torch.set_num_threads(threads)
    draw = torch.Generator().manual_seed(0)
    hidden_nd = torch.randn(TOKENS, WIDTH, generator=draw).requires_grad_()
    weight_vd = torch.randn(VOCAB, WIDTH, generator=draw).mul_(0.02).requires_grad_()
    targets_n = torch.randint(VOCAB, (TOKENS,), generator=draw)
    F.linear(hidden_nd[:8], weight_vd[:8]).sum().backward()  # what any product allocates once, and both gradients
    hidden_nd.grad = weight_vd.grad = None
    begun = time.perf_counter()
    if case == "plain":
        F.cross_entropy(F.linear(hidden_nd, weight_vd), targets_n).backward()
    elif case == "chunked":
        (chunked_cross_entropy(hidden_nd, weight_vd, targets_n)[0] / TOKENS).backward()
    else:
        hidden_nd.grad, weight_vd.grad = torch.ones_like(hidden_nd), torch.ones_like(weight_vd)
    seconds = time.perf_counter() - begun
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "seconds": seconds}


def in_child(case: str, threads: int) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--case", case, "--threads", str(threads)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(found.stdout)
    return answer


def main() -> int:
    """Measure and print; exit code 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.case, given.threads)))
        return 0
    runs = {case: [in_child(case, given.threads) for _ in range(given.repetitions)] for case in CASES}
    median = {
        case: {key: statistics.median(run[key] for run in found) for key in ("bytes", "seconds")}
        for case, found in runs.items()
    }
    added = {case: median[case]["bytes"] - median["baseline"]["bytes"] for case in CASES[1:]}
    print(f"{TOKENS} tokens, vocabulary {VOCAB}, width {WIDTH}, fp32, {given.threads} threads")
    for case, size in added.items():
        print(f"{case:<10}{size / 2**20:>9,.0f} MiB beyond inputs and gradients{median[case]['seconds']:>8.2f} s")
    memory, duration = added["chunked"] / added["plain"], median["chunked"]["seconds"] / median["plain"]["seconds"]
    print(f"chunked / plain: memory {memory:.1%} (goal: at most {GOAL:.0%}), time {duration:.2f}")
    if given.json is not None:
        report = {"added_bytes": added, "median": median, "memory_ratio": memory, "time_ratio": duration}
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if memory <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
