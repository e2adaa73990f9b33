"""What measuring updates costs: training steps under an UpdateMeter against steps without.

    python benchmarks/update_meter.py [--threads N] [--rounds 15] [--quick] [--cpu] [--json PATH]

A decoder of about 11 million parameters at 2048 tokens a batch, in fp32, with torch's fused AdamW. Three kinds of steps of one
trainer take turns: plain; under a meter, not measured; under a meter, measured with all metrics. The cost of measuring every 10
steps is 0.9 times the second and 0.1 times the third ratio to a plain step; ratios are medians of those within rounds, and each
step includes attaching its meter. Goal: at most 1.02.

`own` is the same where the meter keeps an average of gradients of its own (`beta` given), as for an optimizer that keeps none.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from alternating import measure, parser_of, ratio, started
from throughput import VOCAB, RandomTokens

from torchstone.diagnose.updates import UpdateMeter
from torchstone.models.counts import count
from torchstone.recipe.load import load_recipe
from torchstone.train.distributed import World
from torchstone.train.loop import Trainer
from torchstone.train.precision import Compute

WIDTH, DEPTH, LENGTH, SEQUENCES, EVERY, GOAL = 320, 8, 256, 8, 10, 1.02


def trainer() -> Trainer:
    """A trainer on random tokens."""
    recipe = load_recipe(
        {
            "model": {"kind": "decoder", "width": WIDTH, "depth": DEPTH, "head_dim": 64},
            "data": {"kind": "recall"}, "optimizer": {"kind": "adamw", "clip": 1.0}, "schedule": "constant",
            "budget": {"steps": 10**6}, "batch": {"sequences": SEQUENCES}, "precision": "fp32", "compile": False,
        }
    )  # fmt: skip
    counts, data = count(recipe.model, VOCAB, LENGTH), RandomTokens(LENGTH)
    model = recipe.model.build(VOCAB, LENGTH, 0)
    model.train()
    place = World(0, 1, torch.device("cpu"))
    return Trainer(recipe, model, data, Compute("fp32", False), place, 10**6, counts)


def step(trained: Trainer, **meter: Any) -> Callable[[], None]:
    """One step, under a meter where its settings are given."""

    def run() -> None:
        attached = UpdateMeter(trained.model, trained.optimizer, early=0, **meter) if meter else None
        trained.step()
        if attached is not None:
            assert len(attached.records) == (meter["every"] == 1)
            attached.close()

    return run


def main() -> int:
    """Measure and print; exit code 1 if the goal is missed."""
    given, clock = started(parser_of(__doc__, rounds=15, quick=5))
    trained = trainer()
    parameters = sum(value.numel() for value in trained.model.parameters())
    print(
        f"torch {torch.__version__}, {given.threads} threads, {parameters / 1e6:.1f}M parameters, {LENGTH * SEQUENCES} tokens"
    )
    runs = {
        "plain": step(trained),
        "watched": step(trained, every=EVERY, step=1),
        "measured": step(trained, every=1, step=1),
        "watched, own": step(trained, every=EVERY, step=1, beta=0.9),
        "measured, own": step(trained, every=1, step=1, beta=0.9),
    }
    found = measure(runs, given.rounds, clock, warm=2)
    for name, seconds in found.items():
        print(
            f"{name:<14}{statistics.median(seconds) * 1e3:>10.1f} ms{ratio(seconds, found['plain']):>9.3f} times plain"
        )
    ratios = {}
    for name, suffix in (("every 10 steps", ""), ("every 10 steps, own", ", own")):
        each, measured = (ratio(found[f"{kind}{suffix}"], found["plain"]) for kind in ("watched", "measured"))
        ratios[name] = (EVERY - 1) / EVERY * each + measured / EVERY
        print(f"{name:<22}{ratios[name]:>8.4f} times plain" + (f" (goal: at most {GOAL})" if not suffix else ""))
    if given.json is not None:
        report = {"torch": torch.__version__, "threads": given.threads, "seconds": found, "ratios": ratios}
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if ratios["every 10 steps"] > GOAL else 0


if __name__ == "__main__":
    sys.exit(main())
