"""What DAPE V2 costs: a training step and the attention layer in turns with others, and the memory of a long evaluation.

    python benchmarks/dape.py [--threads N] [--rounds 9] [--quick] [--cpu] [--json PATH]

A step is forward and backward of two blocks with SwiGLU at 512 tokens, without torch.compile. Candidates take turns
within every round; ratios are medians of the ratios within rounds.

  plain           rotary attention as it comes, through the fastest kernel
  eager           the same with explicit maps, step by step
  kerple          attention with the same position bias, without a processor
  dape            DAPE V2 on Kerple, D = 32, k = 3
  transcription   the formula of DAPE V2 written down directly: concat, lower triangle, convolution, lower triangle,
                  convolution, with the same weights (with `mask_hidden`, as `dape`), in fp32

Goals: a step of `dape` at most 2.0 times one of `eager`; the layer of `dape` at least 1.5 times as fast as that of
`transcription`. Memory is the peak of a process of its own that evaluates 8192 tokens in one layer with 12 heads, less
that of one that evaluates rotary attention.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from alternating import measure, ratio
from torch import Tensor, nn

from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.attention.dape import DAPE
from torchstone.nn.attention.observe import Observation
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.span import Span

VOCAB, LENGTH, LONG = 256, 512, 8192
SHAPES = {"E 768, H 12": (768, 12, 2), "E 256, H 8": (256, 8, 4)}  # width, heads, sequences
PLAIN: dict[str, Any] = {"kind": "attention"}
KERPLE = {**PLAIN, "position": "kerple"}
PROCESSED = {**KERPLE, "score_processor": "dape"}
MIXERS = {"plain": PLAIN, "eager": PLAIN, "kerple": KERPLE, "dape": PROCESSED, "transcription": PROCESSED}
STEP_GOAL, LAYER_GOAL = 2.0, 1.5
Runs = dict[str, Callable[[], object]]


class Transcription(ScoreProcessor):
    """The formula, operation by operation, with the weights of a DAPE."""

    reach = 1

    def __init__(self, dape: DAPE) -> None:
        super().__init__()
        self.conv1, self.conv2 = dape.conv1, dape.conv2

    def forward(self, scores_buts: Tensor, bias_buts: Tensor | None, visible_b1ts: Tensor | None) -> Tensor:
        """Processed scores."""
        assert bias_buts is not None
        bias_buts = bias_buts.expand_as(scores_buts)
        read_bcts = torch.tril(torch.cat([scores_buts, bias_buts], dim=1))
        hidden_bdts = torch.tril(F.leaky_relu(self.conv1(read_bcts), 0.01))
        return scores_buts + bias_buts + self.conv2(hidden_bdts)

    def flops(self, length: int) -> float:
        """Not counted."""
        return 0.0

    def kept_values(self, length: int) -> int:
        """Not counted."""
        return 0


def build(name: str, width: int, heads: int, depth: int, length: int) -> Decoder:
    """A decoder of one candidate."""
    block = {"mixer": MIXERS[name], "feedforward": "swiglu"}
    config = {"width": width, "depth": depth, "head_dim": width // heads, "block": block}
    model = DecoderConfig.model_validate(config).build(VOCAB, length, 0)
    for layer in model.blocks:
        mixer: Any = layer.mixer  # type: ignore[union-attr]
        if name == "eager":
            mixer.observation = Observation()
        if name == "transcription":
            mixer.score_processor = Transcription(mixer.score_processor)
    return model


def trained(model: nn.Module, forward: Callable[[], Tensor], precision: str) -> Callable[[], object]:
    """Forward and backward."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = forward()
        out.float().pow(2).mean().backward()

    return step


def steps_of(shape: str, precision: str) -> tuple[Runs, Runs]:
    """A step, and the attention layer alone, of every candidate."""
    width, heads, rows = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)
    tokens_bt = torch.randint(VOCAB, (rows, LENGTH), generator=draw)
    x_btd = torch.randn(rows, LENGTH, width, generator=draw)
    whole: Runs = {}
    layers: Runs = {}
    for name in MIXERS:
        model = build(name, width, heads, 2, LENGTH)
        mixer: Any = model.blocks[0].mixer  # type: ignore[union-attr]
        whole[name] = trained(model, lambda model=model: model(tokens_bt).hidden_btd, precision)  # type: ignore[misc]
        layers[name] = trained(mixer, lambda mixer=mixer: mixer(x_btd, Span())[0], precision)  # type: ignore[misc]
    return whole, layers


def report(title: str, found: dict[str, list[float]]) -> dict[str, float]:
    """Print milliseconds and ratios; the ratios."""
    times = "  ".join(f"{name} {statistics.median(values) * 1e3:,.0f}" for name, values in found.items())
    ratios = {f"dape / {name}": ratio(found["dape"], found[name]) for name in ("plain", "eager", "kerple")}
    ratios["transcription / dape"] = ratio(found["transcription"], found["dape"])
    shown = "  ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    print(f"{title} (ms): {times}\n    {shown}", flush=True)
    return ratios


def evaluate(name: str, threads: int) -> dict[str, float]:
    """Peak bytes and seconds of one long evaluation, in this process."""
    torch.set_num_threads(threads)
    model = build(name, 768, 12, 1, LENGTH).eval()
    tokens_bt = torch.zeros(1, LONG, dtype=torch.long)
    begun = time.perf_counter()
    with torch.no_grad():
        model(tokens_bt)
    seconds = time.perf_counter() - begun
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "seconds": seconds}


def in_child(name: str, threads: int) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--evaluate", name, "--threads", str(threads)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--cpu", action="store_true", help="processor time; meaningful with --threads 1 only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--evaluate", choices=MIXERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.evaluate:
        print(json.dumps(evaluate(given.evaluate, given.threads)))
        return 0
    if given.cpu and given.threads != 1:
        parser.error("--cpu adds up the time of all threads; use it with --threads 1")
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.cpu else time.perf_counter
    rounds, missed = 3 if given.quick else given.rounds, 0
    print(f"torch {torch.__version__}, {given.threads} threads, {LENGTH} tokens, {rounds} rounds")
    ratios: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        for precision in ("fp32", "bf16"):
            for kind, runs in zip(("step", "layer"), steps_of(shape, precision), strict=True):
                title = f"{kind}, {shape}, {precision}"
                ratios[title] = report(title, measure(runs, rounds, clock))
        missed += ratios[f"step, {shape}, fp32"]["dape / eager"] > STEP_GOAL
        missed += ratios[f"layer, {shape}, fp32"]["transcription / dape"] < LAYER_GOAL
    print(f"goals, fp32: step dape / eager at most {STEP_GOAL}, layer transcription / dape at least {LAYER_GOAL}")
    peaks = {name: in_child(name, given.threads) for name in ("plain", "kerple", "dape")}
    for name, peak in peaks.items():
        extra = (peak["bytes"] - peaks["plain"]["bytes"]) / 2**20
        print(
            f"evaluation of {LONG} tokens, {name:<8}{peak['bytes'] / 2**20:>8,.0f} MiB ({extra:+,.0f}){peak['seconds']:>7.1f} s"
        )
    if given.json is not None:
        given.json.write_text(json.dumps({"ratios": ratios, "evaluation": peaks}, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
