"""What Pattention costs: forward and backward of one layer in turns with an MLP of equal FLOPs and with the plain formula.

    python benchmarks/tokenformer.py [--threads N] [--rounds 15] [--quick] [--cpu] [--json PATH]

Candidates take turns within every round; ratios are medians of the ratios within rounds.

  mlp      W_out GELU(W_in x), hidden size n: the same two products as Pattention with n tokens
  linear   one matrix of equal FLOPs: its outputs are twice n where inputs and outputs of Pattention are d
  plain    the formula of Pattention, operation by operation, through autograd
  layer    Pattention

Goal: `layer` at most 1.2 times the time of `mlp`, in fp32 and every shape.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from alternating import measure, parser_of, started
from torch import Tensor, nn

from torchstone.nn.projection.pattention import Pattention, PattentionConfig

SHAPES = {  # width, parameter tokens, tokens of the batch
    "d 64, n 256": (64, 256, 2048),
    "d 256, n 256": (256, 256, 2048),
    "d 256, n 1024": (256, 1024, 2048),
    "d 768, n 3072": (768, 3072, 512),
}
GOAL = 1.2


class MLP(nn.Module):
    """Two layers without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x_td: Tensor) -> Tensor:
        """[t, d] → [t, d]."""
        y_td: Tensor = self.w_out(F.gelu(self.w_in(x_td)))
        return y_td


class Plain(nn.Module):
    """The formula on the parameters of a Pattention."""

    def __init__(self, layer: Pattention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_td: Tensor) -> Tensor:
        """[t, d] → [t, d]."""
        scores_tn = F.linear(x_td, self.layer.keys_nd)
        norm_t1 = (scores_tn.float().square().sum(-1, keepdim=True) + self.layer.settings.eps).sqrt()
        return F.gelu((scores_tn / norm_t1 * self.layer.tau).to(scores_tn.dtype)) @ self.layer.values_ne


def candidates(width: int, tokens: int) -> dict[str, nn.Module]:
    """All candidates of one shape."""
    layer = Pattention(PattentionConfig(), width, width, tokens, 0, 0.02, "feedforward")
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.02, generator=draw)
    layer.fill_buffers()
    linear = nn.Linear(width, 2 * tokens, bias=False)
    return {"mlp": MLP(width, tokens), "linear": linear, "plain": Plain(layer), "layer": layer}


def step_of(module: nn.Module, x_td: Tensor, precision: str) -> Callable[[], object]:
    """Forward and backward, the gradient of the input included."""
    x_td = x_td.clone().requires_grad_()

    def step() -> None:
        module.zero_grad(set_to_none=True)
        x_td.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            out = module(x_td)
        out.backward(torch.ones_like(out))

    return step


def main() -> int:
    """Measure and print; exit code 1 if the goal is missed."""
    given, clock = started(parser_of(__doc__, rounds=15, quick=5))
    rounds, missed = given.rounds, 0
    print(f"torch {torch.__version__}, {given.threads} threads, {rounds} rounds, forward and backward")
    ratios: dict[str, dict[str, float]] = {}
    for shape, (width, tokens, batch) in SHAPES.items():
        x_td = torch.randn(batch, width, generator=torch.Generator().manual_seed(1))
        for precision in ("fp32", "bf16"):
            runs = {name: step_of(module, x_td, precision) for name, module in candidates(width, tokens).items()}
            found = measure(runs, rounds, clock)
            over = {
                name: statistics.median(a / b for a, b in zip(found["layer"], found[name], strict=True))
                for name in ("mlp", "linear", "plain")
            }
            ratios[f"{shape}, {precision}"] = over
            times = "  ".join(f"{name} {statistics.median(values) * 1e3:.2f}" for name, values in found.items())
            shown = "  ".join(f"layer / {name} {value:.2f}" for name, value in over.items())
            print(f"{shape}, {batch} tokens, {precision} (ms): {times}\n    {shown}", flush=True)
            missed += precision == "fp32" and over["mlp"] > GOAL
    print(f"goal, fp32: layer / mlp at most {GOAL}")
    if given.json is not None:
        given.json.write_text(json.dumps({"ratios": ratios}, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
