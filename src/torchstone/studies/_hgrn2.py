"""Metrics, tables and figures of the HGRN2 study, and published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchstone.lab.study import Cell, Measurement
from torchstone.models.counts import Counts
from torchstone.nn.recurrence.hgrn2 import MEMORY_EDGES, memories
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Table

MUCH, LITTLE = 0.2, 0.05
METRICS = (
    Metric(name="accuracy", label="accuracy (text arms: of the next byte)", better="higher"),
    Metric(name="validation_loss", label="validation loss", unit="nats/token"),
)
NOTES = (
    "Arms of different E share every parameter shape and the initial values; they differ in the layout of the heads alone.",
    "FLOPs are those of the formula in `docs/methods/hgrn2.md`, state included; they rise with E.",
    "Memory is 1/(1 − f), in tokens, over the gates of all tokens and channels of 32 held-out sequences.",
)
PAPER = (
    PaperFigure(setting="6 tasks, average, 100B tokens: 0.15B / 0.39B / 1.0B parameters", paper="HGRN 41.27 / 43.60 / 47.61, "
                "HGRN2 42.15 / 46.47 / 50.84 (project page)", ours="not run"),
    PaperFigure(setting="the same, 2.9B parameters", paper="HGRN2 53.24; Pythia-2.8B 54.35, OPT-2.7B 53.79 at 300B tokens",
                ours="not run"),
    PaperFigure(setting="1.3B parameters, 100B tokens, WikiText perplexity / average (Gated DeltaNet paper)",
                paper="HGRN2 19.10 / 51.79; RetNet 19.08 / 52.02; Mamba 17.92 / 53.12; Transformer++ 18.53 / 52.25",
                ours="not run"),
)  # fmt: skip


def equal_in_size(names: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Arms that differ in E alone: of recall, and of text."""
    recall = [name for name in names if name in ("e1", "e8", "e64")]
    text = [name for name in names if name.startswith("text.e")]
    return recall, text


@torch.no_grad()
def anatomy(model: Any, tokens_bt: Tensor, counts: Counts) -> dict[str, Any]:
    """What a model holds and costs, and the memory of its recurrent layers."""
    length = tokens_bt.shape[1]
    layers = [
        {"median": one.median, "shares": one.shares, "beta": sum(one.beta) / len(one.beta), "state": one.state_bytes}
        for one in memories(model, tokens_bt.to(model.embed.weight.device))
    ]
    return {
        "parameters": counts.parameters,
        "flops": counts.training_flops_per_token,
        "state": model.new_state(1, length).nbytes(),
        "layers": layers,
    }


def by_arm(cells: Sequence[tuple[Cell, Measurement]]) -> dict[str, dict[int, Measurement]]:
    """Arm → seed → measurement."""
    found: dict[str, dict[int, Measurement]] = {}
    for cell, measurement in cells:
        found.setdefault(cell.arm.name, {})[cell.seed] = measurement
    return found


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def rule(differences: Sequence[float]) -> str:
    """What the rule written beforehand says of the gain in accuracy of every seed."""
    if len(differences) >= 3 and min(differences) >= MUCH:
        return "holds"
    if len(differences) >= 3 and max(differences) <= LITTLE:
        return "fails"
    return "open"


def rule_table(cells: Sequence[tuple[Cell, Measurement]]) -> Table:
    """Accuracy of E = 8 and of E = 64 above that of E = 1, seed by seed, and what the rule says."""
    arms, rows = by_arm(cells), []
    base = arms.get("e1", {})
    for name in ("e8", "e64"):
        seeds = sorted(base.keys() & arms.get(name, {}).keys())
        gains = [arms[name][seed].metrics["accuracy"] - base[seed].metrics["accuracy"] for seed in seeds]
        rows.append((name, ", ".join(f"{gain:+.3f}" for gain in gains), rule(gains)))
    note = f"holds: at least {MUCH} in every seed, of three or more; fails: at most {LITTLE} in every seed"
    return Table(
        title="The rule written beforehand",
        columns=("arm", "gain over e1 by seed", "rule"),
        rows=tuple(rows),
        note=note,
    )


def cost_table(cells: Sequence[tuple[Cell, Measurement]]) -> Table:
    """Parameters, FLOPs, state and results of every arm."""
    rows = []
    for arm, seeds in by_arm(cells).items():
        found = list(seeds.values())
        extra = found[0].extra
        numbers = [
            mean([one.metrics[name] for one in found if name in one.metrics])
            for name in ("accuracy", "validation_loss")
        ]
        rows.append((arm, extra["parameters"], round(extra["flops"]), extra["state"], *numbers))
    columns = ("arm", "parameters", "training FLOPs per token", "state bytes", "accuracy", "validation loss")
    note = "state of one sequence of the training length in fp32, all layers; means over seeds"
    return Table(title="Size and cost", columns=columns, rows=tuple(rows), note=note)


def memory_table(cells: Sequence[tuple[Cell, Measurement]]) -> Table:
    """Lower bound and memory of every layer."""
    rows = []
    for arm, seeds in by_arm(cells).items():
        depth = min(len(one.extra["layers"]) for one in seeds.values())
        for layer in range(depth):
            found = [one.extra["layers"][layer] for one in seeds.values()]
            long = [sum(one["shares"][LONG:]) for one in found]
            numbers = (mean([one["beta"] for one in found]), mean([one["median"] for one in found]), mean(long))
            rows.append((arm, layer, *numbers, found[0]["state"]))
    columns = (
        "arm",
        "layer",
        "mean lower bound",
        "median memory (tokens)",
        f"share above {MEMORY_EDGES[LONG - 1]:g}",
        "state bytes",
    )
    return Table(title="What layers remember", columns=columns, rows=tuple(rows), note="means over seeds")


LONG = 5  # the bin of the histogram from which memory counts as long: 32 tokens


def figures(cells: Sequence[tuple[Cell, Measurement]]) -> tuple[Figure, ...]:
    """Recall against the size of the state at equal parameters, and histograms of memory."""
    arms = by_arm(cells)
    points = []
    for name in ("e1", "e8", "e64"):
        found = list(arms.get(name, {}).values())
        if found:
            values = [one.metrics["accuracy"] for one in found]
            points.append((float(found[0].extra["state"]), sum(values) / len(values), min(values), max(values)))
    made = []
    if points:
        x, y, low, high = zip(*points, strict=True)
        line = Line(name="E = 1, 8, 64", x=x, y=y, low=low, high=high)
        made.append(Figure(title="Recall at equal parameters", x_label="bytes of state", y_label="accuracy", log_x=True,
                           lines=(line,), note="mean and range over seeds"))  # fmt: skip
    return (*made, *(_histogram(name, arms[name]) for name in ("e8", "e8-unbounded", "text.e64") if name in arms))


def _histogram(arm: str, seeds: Mapping[int, Measurement]) -> Figure:
    """Shares of gates by memory, a line per layer, of the lowest seed."""
    layers = seeds[min(seeds)].extra["layers"]
    x = (1.0, *MEMORY_EDGES)
    lines = tuple(Line(name=f"layer {number}", x=x, y=tuple(layer["shares"])) for number, layer in enumerate(layers))
    return Figure(title=f"Memory of {arm}", x_label="1 / (1 − f), tokens", y_label="share of gates", log_x=True, lines=lines,
                  note=f"seed {min(seeds)}; from each mark to the next")  # fmt: skip
