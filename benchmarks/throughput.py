"""Training speed: ours against transformers' Llama of the same shape, and differential against plain attention.

    python benchmarks/throughput.py [--threads N] [--rounds 9] [--quick] [--json PATH]

A step is all that training does: forward, loss, backward, clipping, fused AdamW, learning rate. Candidates take
turns within every round, so that a slow minute hits all of them; ratios are medians of the ratios within rounds.

  hf default   LlamaForCausalLM in fp32 without torch.compile, as it comes
  hf best      the same under bf16 autocast and torch.compile
  ours         `torchstone.train.loop.Trainer.step`, in both modes
  v1, v2       differential attention at 1024 tokens, the feed-forward layer narrowed to equal parameters
  more heads   plain attention with 1.5 times the heads, equally narrowed: the authors' match for version 2, which doubles
               the queries and with them the work of attention

`peak` is the share of a large bf16 matrix product's speed on the same threads. Goals: ours best at least 1.15 times
hf best and 2.5 times hf default; a step of v2 at most 1.15, of v1 at most 1.35 times a plain one.

Needs transformers. On a machine that does other work the ratios scatter; there, `--threads 1 --cpu` counts the
processor time of one thread instead, which others delay but hardly change.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchstone.data.batch import Batch
from torchstone.models.counts import Counts, count
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.distributed import World
from torchstone.train.loop import Trainer
from torchstone.train.precision import Compute

VOCAB, WIDTH, DEPTH, HEAD_DIM, HIDDEN = 4096, 256, 6, 64, 688
LEARNING_RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
SHORT, LONG = (256, 8), (1024, 2)  # tokens of a sequence, sequences of a batch
PLAIN = {"kind": "attention", "position": {"kind": "rotary", "layout": "half"}}
# ratio → (faster, slower, unit of the goal, goal)
GOALS = {
    "ours best / hf best": ("ours best", "hf best", 1.15),
    "ours best / hf default": ("ours best", "hf default", 2.5),
    "ours fp32 / hf default": ("ours fp32", "hf default", None),
}
COSTS = {
    "v2 / plain": ("v2", "plain", 1.15),
    "v2 / more heads": ("v2", "more heads", None),
    "v1 / plain": ("v1", "plain", 1.35),
}


@dataclass
class Candidate:
    """Something whose steps are timed."""

    name: str
    step: Callable[[], object]
    flops: float  # of one step
    clock: Callable[[], float] = time.perf_counter

    def seconds(self, steps: int) -> float:
        """Mean seconds of a step."""
        begun = self.clock()
        for _ in range(steps):
            self.step()
        return (self.clock() - begun) / steps


class RandomTokens:
    """Data of random tokens: the same batches for everyone, made in no time."""

    tokenizer = bytes_per_token = None
    fingerprint = "random"

    def __init__(self, length: int) -> None:
        self.length, self.vocab_size = length, VOCAB

    def batch(self, seed: int, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Random tokens that depend on the step."""
        draw = torch.Generator().manual_seed(step % 16)
        tokens = torch.randint(VOCAB, (size, self.length + 1), generator=draw)
        return Batch(tokens[start:stop, :-1].contiguous(), tokens[start:stop, 1:].contiguous())


def recipe_of(mixer: dict[str, Any], hidden: int, sequences: int, compute: Compute) -> Recipe:
    """Our recipe of the benchmark's shape; its data stands for the random tokens."""
    block = {"mixer": mixer, "feedforward": {"kind": "swiglu", "hidden": hidden}}
    model = {"kind": "decoder", "width": WIDTH, "depth": DEPTH, "head_dim": HEAD_DIM, "block": block}
    optimizer = {"kind": "adamw", "learning_rate": LEARNING_RATE, "betas": BETAS, "weight_decay": DECAY, "clip": CLIP}
    return load_recipe(
        {
            "model": model, "data": {"kind": "recall"}, "optimizer": optimizer, "schedule": {"kind": "constant"},
            "budget": {"steps": 10**6}, "batch": {"sequences": sequences}, **compute.data(),
        }
    )  # fmt: skip


def ours(name: str, compute: Compute, shape: tuple[int, int], mixer: dict[str, Any], hidden: int) -> Candidate:
    """A step of our trainer."""
    length, sequences = shape
    recipe = recipe_of(mixer, hidden, sequences, compute)
    counts = counts_of(mixer, hidden, shape)
    model = recipe.model.build(VOCAB, length, 0)
    world = World(0, 1, torch.device("cpu"))
    trainer = Trainer(recipe, model, RandomTokens(length), compute, world, 10**6, counts)
    model.train()
    return Candidate(name, trainer.step, counts.training_flops_per_token * length * sequences)


def counts_of(mixer: dict[str, Any], hidden: int, shape: tuple[int, int]) -> Counts:
    """Parameters and FLOPs of our model."""
    return count(recipe_of(mixer, hidden, shape[1], Compute("fp32", False)).model, VOCAB, shape[0])


def equal_hidden(mixer: dict[str, Any], shape: tuple[int, int]) -> int:
    """The feed-forward width that gives a mixer's model the parameters of the plain one."""
    wanted = counts_of(PLAIN, HIDDEN, shape).parameters
    small, large = (counts_of(mixer, hidden, shape).parameters for hidden in (HIDDEN // 2, HIDDEN))
    slope = (large - small) / (HIDDEN - HIDDEN // 2)
    return round(HIDDEN + (wanted - large) / slope)


def llama(name: str, compute: Compute) -> Candidate:
    """A step of transformers' Llama with torch's fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    length, sequences = SHORT
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=DEPTH,
        num_attention_heads=WIDTH // HEAD_DIM, num_key_value_heads=WIDTH // HEAD_DIM,
        max_position_embeddings=length, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    forward = torch.compile(model) if compute.compile else model
    data, device = RandomTokens(length), torch.device("cpu")
    done = 0

    def step() -> None:
        nonlocal done
        batch = data.batch(0, done, sequences)
        done += 1
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast(device):
            loss = forward(input_ids=batch.tokens_bt, labels=batch.tokens_bt).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        loss.item()

    flops = counts_of(PLAIN, HIDDEN, SHORT).training_flops_per_token * length * sequences
    return Candidate(name, step, flops)


def matmul_peak(clock: Callable[[], float], size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the best of some bf16 products of square matrices."""
    left = torch.ones(size, size, dtype=torch.bfloat16)
    seconds = []
    for _ in range(repeats + 1):
        begun = clock()
        left @ left
        seconds.append(clock() - begun)
    return 2 * size**3 / min(seconds[1:])


def measure(candidates: list[Candidate], clock: Callable[[], float], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of every candidate in every round, after warming up (compilation included)."""
    for candidate in candidates:
        begun = time.perf_counter()
        candidate.seconds(2)
        candidate.clock = clock
        print(f"  {candidate.name}: first two steps {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in range(rounds):
        order = candidates if number % 2 == 0 else candidates[::-1]
        for candidate in order:
            found[candidate.name].append(candidate.seconds(steps))
    return found


def ratio(over: list[float], under: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


def against_llama() -> list[Candidate]:
    """Both libraries in both modes."""
    fp32, best = Compute("fp32", False), Compute("bf16", True)
    return [
        llama("hf default", fp32),
        llama("hf best", best),
        ours("ours fp32", fp32, SHORT, PLAIN, HIDDEN),
        ours("ours best", best, SHORT, PLAIN, HIDDEN),
    ]


def differential() -> list[Candidate]:
    """Plain and differential attention in our best mode, with equal parameters."""
    best = Compute("bf16", True)
    more = {**PLAIN, "heads": WIDTH // HEAD_DIM * 3 // 2, "head_dim": HEAD_DIM}
    candidates = [
        ours("plain", best, LONG, PLAIN, HIDDEN),
        ours("more heads", best, LONG, more, equal_hidden(more, LONG)),
    ]
    for version in ("v1", "v2"):
        mixer = {**PLAIN, "kind": "differential", "version": version}
        candidates.append(ours(version, best, LONG, mixer, equal_hidden(mixer, LONG)))
    return candidates


def show(shape: tuple[int, int], candidates: list[Candidate], found: dict[str, list[float]], peak: float) -> None:
    """Medians of each candidate."""
    tokens = shape[0] * shape[1]
    print(f"\n{shape[1]} sequences of {shape[0]} tokens\n{'':<14}{'ms/step':>9}{'tokens/s':>11}{'peak':>8}")
    for candidate in candidates:
        median = statistics.median(found[candidate.name])
        share = candidate.flops / median / peak
        print(f"{candidate.name:<14}{median * 1e3:>9.1f}{tokens / median:>11,.0f}{share:>8.1%}")


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 rounds of few steps")
    parser.add_argument("--cpu", action="store_true", help="processor time; meaningful with --threads 1 only")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.cpu and given.threads != 1:
        parser.error("--cpu adds up the time of all threads; use it with --threads 1")
    torch.set_num_threads(given.threads)
    rounds, steps = (3, 3) if given.quick else (given.rounds, 10)
    clock = time.process_time if given.cpu else time.perf_counter
    peak = matmul_peak(clock)
    print(f"torch {torch.__version__}, {given.threads} threads, bf16 product {peak / 1e9:.0f} GFLOP/s")
    report: dict[str, Any] = {"torch": torch.__version__, "threads": given.threads, "peak_flops": peak}
    missed = 0
    candidates = against_llama()
    found = measure(candidates, clock, rounds, steps)
    show(SHORT, candidates, found, peak)
    report["seconds"], report["ratios"] = dict(found), {}
    for name, (fast, slow, goal) in GOALS.items():
        value = report["ratios"][name] = ratio(found[slow], found[fast])
        missed += goal is not None and value < goal
        print(f"{name:<26}{value:>6.2f} times as fast{f' (goal: at least {goal})' if goal else ''}")
    candidates = differential()
    found = measure(candidates, clock, rounds, steps)
    show(LONG, candidates, found, peak)
    report["seconds"] |= found
    for name, (slow, fast, goal) in COSTS.items():
        value = report["ratios"][name] = ratio(found[slow], found[fast])
        missed += goal is not None and value > goal
        print(f"{name:<26}{value:>6.2f} times the step{f' (goal: at most {goal})' if goal else ''}")
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
