"""What the recurrent layer of RecurrentGemma costs: the scan against loops, and the layer against transformers'.

    python benchmarks/recurrentgemma.py [--threads N] [--rounds 7] [--quick] [--cpu] [--json PATH]

Forward and backward in fp32. Candidates take turns within every round; ratios are medians of the ratios within rounds.

  scan      `linear_scan`: two directions without autograd, in blocks
  indexed   h = a[:, t] * h + b[:, t] under autograd, as published layers write it: the gradient of every index is a tensor of
            all steps, so that the backward pass grows with the square of the length
  unbound   the same loop over `a.unbind(1)`, which avoids that; nobody is told to write it so
  layer     the recurrent block: projections, convolution, gates, scan
  theirs    transformers' RecurrentGemmaRecurrentBlock with the same weights; both outputs are compared first

Goals at 1024 tokens: scan at least 20 times as fast as `indexed`, layer at least 10 times as fast as `theirs`. The ratio to
`unbound` is shown without a goal: for wide steps both wait for memory.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
from alternating import measure, parser_of, started
from torch import Tensor, nn

from torchstone.nn.context import BuildContext
from torchstone.nn.fan_in import FanInConfig
from torchstone.nn.recurrence.linear_scan import linear_scan
from torchstone.nn.recurrence.linear_scan_reference import linear_scan_reference
from torchstone.nn.recurrence.rglru import RecurrentBlock, RGLRUConfig
from torchstone.nn.span import Span

LENGTH = 1024
SCANS = {"1 row of 256": (1, 256), "4 rows of 128": (4, 128), "8 rows of 256": (8, 256)}
LAYERS = {"1 row, width 256": (1, 256), "4 rows, width 128": (4, 128)}
BLOCKS = 4
SCAN_GOAL, LAYER_GOAL = 20.0, 10.0
Runs = dict[str, Callable[[], object]]


def indexed(a_btd: Tensor, b_btd: Tensor) -> Tensor:
    """The loop that published layers have."""
    h_bd, found = torch.zeros_like(b_btd[:, 0]), []
    for step in range(a_btd.shape[1]):
        h_bd = a_btd[:, step] * h_bd + b_btd[:, step]
        found.append(h_bd)
    return torch.stack(found, dim=1)


def scans(rows: int, width: int) -> Runs:
    """Forward and backward of the scan and of the loops."""
    draw = torch.Generator().manual_seed(0)
    a_btd = torch.rand(rows, LENGTH, width, generator=draw).requires_grad_()
    b_btd, weight_btd = (torch.randn(rows, LENGTH, width, generator=draw) for _ in range(2))
    b_btd.requires_grad_()

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(a_btd, b_btd), (a_btd, b_btd), weight_btd)

    return {
        "scan": run(lambda a, b: linear_scan(a, b)[0]),
        "indexed": run(indexed),
        "unbound": run(lambda a, b: linear_scan_reference(a, b)[0]),
    }


def as_theirs(ours: RecurrentBlock) -> dict[str, Tensor]:
    """Our block's weights under transformers' names."""
    names = {"w_y": "linear_y", "w_x": "linear_x", "w_o": "linear_out"}
    found = {
        f"{names[name]}.{kind}": ours.get_parameter(f"{name}.{kind}") for name in names for kind in ("weight", "bias")
    }
    found |= {"conv_1d.weight": ours.conv.weight.T.unsqueeze(1), "conv_1d.bias": ours.conv.bias}
    for gate, name in (("input_gate", "input_gate"), ("recurrence_gate", "recurrent_gate")):
        found |= {f"rg_lru.{name}_{kind}": ours.rg_lru.get_parameter(f"{gate}.{kind}") for kind in ("weight", "bias")}
    return found | {"rg_lru.recurrent_param": ours.rg_lru.alpha}


def layers(rows: int, width: int) -> Runs:
    """Forward and backward of both layers."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    ours = RGLRUConfig(num_blocks=BLOCKS).build(BuildContext(width, width // BLOCKS, 2, 0, 1, LENGTH))
    FanInConfig().fill(ours, 2, 0)
    sizes = {"hidden_size": width, "lru_width": width, "num_attention_heads": BLOCKS, "head_dim": width // BLOCKS}
    theirs = RecurrentGemmaRecurrentBlock(RecurrentGemmaConfig(**sizes, conv1d_width=4), layer_idx=0)
    theirs.load_state_dict(as_theirs(ours))
    draw = torch.Generator().manual_seed(0)
    x_btd, weight_btd = (torch.randn(rows, LENGTH, width, generator=draw) for _ in range(2))
    position_bt = torch.arange(LENGTH).expand(rows, -1)

    def forward() -> Tensor:
        out: Tensor = theirs(x_btd, position_bt, None, use_cache=False)[0]
        return out

    torch.testing.assert_close(ours(x_btd, Span())[0], forward(), atol=1e-4, rtol=1e-4)

    def run(module: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), list(module.parameters()), weight_btd)

    return {"layer": run(ours, lambda: ours(x_btd, Span())[0]), "theirs": run(theirs, forward)}


def report(title: str, found: dict[str, list[float]]) -> dict[str, float]:
    """Print milliseconds and how many times as long as the first the others take."""
    first = next(iter(found))
    times = "  ".join(f"{name} {statistics.median(values) * 1e3:,.1f}" for name, values in found.items())
    ratios = {
        f"{name} / {first}": statistics.median(a / b for a, b in zip(values, found[first], strict=True))
        for name, values in found.items()
        if name != first
    }
    print(
        f"{title} (ms): {times}\n    " + "  ".join(f"{name} {value:.1f}" for name, value in ratios.items()), flush=True
    )
    return ratios


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    given, clock = started(parser_of(__doc__, rounds=7, quick=3))
    rounds, missed = given.rounds, 0
    print(f"torch {torch.__version__}, {given.threads} threads, {LENGTH} tokens, {rounds} rounds")
    ratios: dict[str, dict[str, float]] = {}
    for title, sizes in SCANS.items():
        ratios[title] = report(title, measure(scans(*sizes), rounds, clock))
        missed += ratios[title]["indexed / scan"] < SCAN_GOAL
    for title, sizes in LAYERS.items():
        ratios[title] = report(title, measure(layers(*sizes), rounds, clock))
        missed += ratios[title]["theirs / layer"] < LAYER_GOAL
    print(f"goals: indexed / scan at least {SCAN_GOAL:g}, theirs / layer at least {LAYER_GOAL:g}")
    if given.json is not None:
        given.json.write_text(json.dumps(ratios, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
