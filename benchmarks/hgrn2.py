"""Gated linear attention in chunks, against the recurrence token by token; on CUDA, HGRN2 against flash-linear-attention's layer.

    python benchmarks/hgrn2.py [--threads 1] [--rounds 7] [--device cpu|cuda] [--json PATH]

On the CPU: forward and backward under autograd, fp32, candidates in turns within every round; ratios are medians of the ratios
within rounds. The clock is the processor time of this process, which other processes do not lengthen, and with several threads
the wall clock.

  chunks     the operator
  loop       the definition, one token after the other, written with an index per token (`reference_gated_linear_attention`)
  lean loop  the same with the tokens unbound beforehand, which spares autograd a gradient of full size per token

Goal: `loop` takes at least 8 times as long as `chunks` with B 8, T 256, H 4, K = V = 32, on one thread.

On CUDA: forward and backward of one whole layer, bf16 under autocast, with our own operator, with the kernels of
flash-linear-attention under our layer, and with that package's own layer (`fla.layers.HGRN2Attention`). Not yet run on GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from alternating import measure
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.initialisation import fill_buffers
from torchstone.nn.recurrence.gated_linear import gated_linear_attention, gated_linear_recurrence
from torchstone.nn.recurrence.gated_linear_reference import reference_gated_linear_attention
from torchstone.nn.recurrence.hgrn2 import HGRN2Config
from torchstone.nn.span import Span

GOAL = 8.0
SIZES = {
    "B 8, T 256, H 4, K 32": (8, 256, 4, 32),
    "B 2, T 1024, H 2, K 128": (2, 1024, 2, 128),
    "B 8, T 256, H 128, K 1": (8, 256, 128, 1),
}
LAYERS = {"B 8, T 2048, d 1024, E 128": (8, 2048, 1024, 128), "B 8, T 2048, d 1024, E 16": (8, 2048, 1024, 16)}
Runs = dict[str, Callable[[], object]]


def operators(b: int, t: int, h: int, k: int) -> Runs:
    """Forward and backward of every candidate on the same numbers."""
    draw = torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(b, t, h, k, generator=draw) for _ in range(3))
    g = nn.functional.logsigmoid(torch.randn(b, t, h, k, generator=draw))
    state = torch.randn(b, h, k, k, generator=draw)
    tensors = [tensor.requires_grad_() for tensor in (q, key, v, g, state)]

    def trained(attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        def run() -> object:
            o, last = attention(*tensors)
            return torch.autograd.grad(o.sum() + last.sum(), tensors)

        return run

    return {
        "chunks": trained(gated_linear_attention),
        "loop": trained(reference_gated_linear_attention),
        "lean loop": trained(gated_linear_recurrence),
    }


def layers(b: int, t: int, width: int, ratio: int) -> Runs:
    """The same of whole layers, on CUDA."""
    x_btd = torch.randn(b, t, width, device="cuda")
    context = BuildContext(width, ratio, 2, 0, 2, t)
    runs: Runs = {}

    def trained(layer: nn.Module, forward: Callable[[nn.Module], Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = forward(layer)
            out.float().sum().backward()
            torch.cuda.synchronize()

        return run

    for backend in ("torch", "fla"):
        layer = HGRN2Config.model_validate({"backend": backend, "expand_ratio": ratio}).build(context).cuda()
        fill_buffers(layer)
        runs[f"ours, {backend}"] = trained(layer, lambda layer: layer(x_btd, Span())[0])
    theirs: Any = importlib.import_module("fla.layers").HGRN2Attention(
        hidden_size=width, expand_ratio=ratio, layer_idx=0
    )
    runs["fla's layer"] = trained(theirs.cuda(), lambda layer: layer(x_btd)[0])
    return runs


def report(title: str, found: dict[str, list[float]]) -> dict[str, float]:
    """Print milliseconds and how many times as long as the first candidate the others take; these ratios."""
    first, *others = found
    times = "  ".join(f"{name} {statistics.median(values) * 1e3:,.1f}" for name, values in found.items())
    ratios = {
        name: statistics.median(one / own for one, own in zip(found[name], found[first], strict=True))
        for name in others
    }
    shown = "  ".join(f"{name} / {first} {value:.1f}" for name, value in ratios.items())
    print(f"{title} (ms): {times}\n    {shown}", flush=True)
    return ratios


def main() -> int:
    """Measure and print; exit code 1 if the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    on_cpu = given.device == "cpu"
    clock = time.process_time if on_cpu and given.threads == 1 else time.perf_counter
    print(
        f"torch {torch.__version__}, {given.device}, {given.threads} threads, {given.rounds} rounds, forward and backward"
    )
    cases = SIZES if on_cpu else LAYERS
    make = operators if on_cpu else layers
    ratios = {title: report(title, measure(make(*sizes), given.rounds, clock)) for title, sizes in cases.items()}
    if given.json is not None:
        given.json.write_text(json.dumps(ratios, indent=1) + "\n")
    if not on_cpu:
        return 0
    reached = ratios[next(iter(SIZES))]["loop"]
    print(f"goal: loop / chunks at least {GOAL:g} in the first case, found {reached:.1f}")
    return int(reached < GOAL)


if __name__ == "__main__":
    sys.exit(main())
