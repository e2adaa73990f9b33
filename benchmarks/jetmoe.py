"""What a layer of experts costs beside a dense layer of equal active FLOPs, and beside a Python loop over experts.

    python benchmarks/jetmoe.py [--threads N] [--rounds 11] [--quick] [--cpu] [--json PATH]

Forward and backward of one layer on 2048 tokens, without torch.compile. Candidates take turns within every round; ratios are
medians of the ratios within rounds.

  dense      SwiGLU as wide as the experts that a token uses together; attention with as many query heads
  grouped    SMoE or MoA, 8 experts, 2 for each token, with both auxiliary losses
  loop       the same with a Python loop over experts, as the authors of JetMoE dispatch

Goal: `grouped` at most 1.3 times `dense`, feed-forward, fp32, one thread (`--threads 1`).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from alternating import measure, parser_of, ratio, started
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.span import Span
from torchstone.recipe.registry import parse_part

EXPERTS, TOP_K, ROWS, LENGTH, HEAD_DIM, VOCAB = 8, 2, 8, 256, 64, 256
SHAPES = {"width 256, f 352": (256, 352), "width 512, f 704": (512, 704)}  # width, hidden width of one expert
GOAL = 1.3
Runs = dict[str, Callable[[], object]]


def parts(kind: str, width: int, hidden: int) -> dict[str, dict[str, Any]]:
    """The part of every candidate."""
    routed = {"num_experts": EXPERTS, "top_k": TOP_K}
    if kind == "feedforward":
        dense: dict[str, Any] = {"kind": "swiglu", "hidden": TOP_K * hidden}
        sparse: dict[str, Any] = {"kind": "smoe", "hidden": hidden, **routed}
    else:
        heads = width // HEAD_DIM
        dense = {"kind": "attention", "heads": heads, "kv_heads": heads // TOP_K}
        sparse = {"kind": "moa", "kv_heads": heads // TOP_K, **routed}
    return {"dense": dense, "grouped": sparse, "loop": {**sparse, "dispatch": "loop"}}


def steps_of(kind: str, shape: str, precision: str) -> tuple[Runs, dict[str, float]]:
    """Forward and backward of every candidate, and its FLOPs per token."""
    width, hidden = SHAPES[shape]
    x_btd = torch.randn(ROWS, LENGTH, width, generator=torch.Generator().manual_seed(0))
    runs: Runs = {}
    flops: dict[str, float] = {}
    for name, part in parts(kind, width, hidden).items():
        layer = parse_part(kind, part).build(BuildContext(width, HEAD_DIM, 1, 0, VOCAB, LENGTH))
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=width**-0.5, generator=generator)
        flops[name] = layer.flops() if kind == "feedforward" else layer.flops(LENGTH)
        runs[name] = step_of(layer, kind, x_btd, precision)
    return runs, flops


def step_of(layer: nn.Module, kind: str, x_btd: Tensor, precision: str) -> Callable[[], object]:
    """Forward and backward of one layer."""

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        given_btd, span = x_btd.clone().requires_grad_(), Span().opened()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = layer(given_btd, span)
        loss = (out if kind == "feedforward" else out[0]).float().pow(2).mean()
        left = span.left()
        (loss if left is None else loss + left).backward()

    return step


def report(title: str, found: dict[str, list[float]], flops: dict[str, float]) -> dict[str, float]:
    """Print milliseconds and ratios; the ratios."""
    times = "  ".join(f"{name} {statistics.median(values) * 1e3:,.1f}" for name, values in found.items())
    ratios = {
        "grouped / dense": ratio(found["grouped"], found["dense"]),
        "loop / grouped": ratio(found["loop"], found["grouped"]),
        "FLOPs, grouped / dense": flops["grouped"] / flops["dense"],
    }
    print(
        f"{title} (ms): {times}\n    " + "  ".join(f"{name} {value:.2f}" for name, value in ratios.items()), flush=True
    )
    return ratios


def main() -> int:
    """Measure and print; exit code 1 if the goal is missed."""
    given, clock = started(parser_of(__doc__, rounds=11, quick=3))
    rounds, missed = given.rounds, 0
    print(f"torch {torch.__version__}, {given.threads} threads, {ROWS * LENGTH} tokens, {rounds} rounds")
    ratios: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        for kind in ("feedforward", "mixer"):
            for precision in ("fp32", "bf16"):
                title = f"{kind}, {shape}, {precision}"
                runs, flops = steps_of(kind, shape, precision)
                ratios[title] = report(title, measure(runs, rounds, clock, warm=2), flops)
        missed += ratios[f"feedforward, {shape}, fp32"]["grouped / dense"] > GOAL
    print(f"goal, feedforward, fp32: grouped / dense at most {GOAL}")
    if given.json is not None:
        given.json.write_text(json.dumps(ratios, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
