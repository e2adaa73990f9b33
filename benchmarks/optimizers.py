"""What an optimizer step costs: Lion, LionA, LionAR and rotational optimizers in turns with torch's AdamW, on the CPU.

    python benchmarks/optimizers.py [--threads N] [--rounds 40] [--quick] [--cpu] [--json PATH]

The parameters are those of a decoder of 10 M, with the groups that recipes make (embeddings and head do not rotate). Candidates
take turns within every round, each with a copy of the model; ratios are medians of the ratios within rounds. `tensors` are the
same optimizers without the compiled kernel.

Goals: LionAR at most 1.5 times and rotational AdamW at most 2.0 times torch's fused AdamW, and both at most 1.3 times its foreach
form; without the kernel, at most 1.3 times the foreach form.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
from alternating import measure, parser_of, ratio, started
from torch import nn

from torchstone.models.decoder import DecoderConfig
from torchstone.optim.lion import LionConfig
from torchstone.optim.liona import LionAConfig
from torchstone.optim.lionar import LionARConfig
from torchstone.optim.momentum import MomentumOptimizer
from torchstone.optim.rotational import RotationalConfig
from torchstone.optim.rrc import RRCLimiter

GOALS = [
    ("lionar", "adamw fused", 1.5),
    ("rotational adamw", "adamw fused", 2.0),
    ("lionar", "adamw foreach", 1.3),
    ("rotational adamw", "adamw foreach", 1.3),
    ("lionar tensors", "adamw foreach", 1.3),
    ("rotational adamw tensors", "adamw foreach", 1.3),
]
SHOWN = [(name, "adamw fused", None) for name in ("lion", "liona", "rotational sgdm", "rotational lion")]
LIMITED = [("lionar limited", "lionar", None)]


def decoder() -> nn.Module:
    """10 M parameters, with a gradient each."""
    model = DecoderConfig(width=256, depth=9, head_dim=64).build(vocab_size=8192, length=128, seed=0)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw) * 1e-2
    return model


def torchs(**how: bool) -> torch.optim.Optimizer:
    """torch's AdamW."""
    return torch.optim.AdamW(decoder().parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **how)


def without_kernel(optimizer: MomentumOptimizer) -> MomentumOptimizer:
    """The optimizer, by tensor operations."""
    optimizer.fused = False
    return optimizer


def limited(optimizer: MomentumOptimizer) -> MomentumOptimizer:
    """The optimizer, with the limit on relative representation change."""
    RRCLimiter(optimizer, 64)
    return optimizer


def candidates() -> dict[str, Callable[[], object]]:
    """A step of every optimizer."""
    rate = 1e-4
    made: dict[str, torch.optim.Optimizer] = {
        "adamw fused": torchs(fused=True),
        "adamw foreach": torchs(foreach=True),
        "lion": LionConfig(learning_rate=rate).build(decoder()),
        "liona": LionAConfig(learning_rate=rate).build(decoder()),
        "lionar": LionARConfig(learning_rate=rate).build(decoder()),
        "lionar limited": limited(LionARConfig(learning_rate=rate).build(decoder())),
        "rotational adamw": RotationalConfig(learning_rate=rate).build(decoder()),
        "rotational sgdm": RotationalConfig(learning_rate=rate, inner="sgdm").build(decoder()),
        "rotational lion": RotationalConfig(learning_rate=rate, inner="lion").build(decoder()),
        "lionar tensors": without_kernel(LionARConfig(learning_rate=rate).build(decoder())),
        "rotational adamw tensors": without_kernel(RotationalConfig(learning_rate=rate).build(decoder())),
    }
    return {name: optimizer.step for name, optimizer in made.items()}


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    given, clock = started(parser_of(__doc__, rounds=40, quick=10))
    count = sum(parameter.numel() for parameter in decoder().parameters())
    print(f"torch {torch.__version__}, {given.threads} threads, {given.rounds} rounds, {count:,} parameters")
    found = measure(candidates(), given.rounds, clock, warm=2)
    for name, values in found.items():
        print(f"{name:26} {statistics.median(values) * 1e3:7.2f} ms")
    missed, ratios = 0, {}
    for name, peer, goal in [*GOALS, *SHOWN, *LIMITED]:
        value = ratios[f"{name} / {peer}"] = ratio(found[name], found[peer])
        missed += goal is not None and value > goal
        print(f"{name} / {peer}: {value:.2f}" + ("" if goal is None else f" (goal {goal})"), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps({"parameters": count, "ratios": ratios}, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
