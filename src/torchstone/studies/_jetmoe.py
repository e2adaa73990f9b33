"""Arms, metrics, loads and figures of the part of the JetMoE study that compares experts with dense layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchstone.lab.matching import counts_of
from torchstone.lab.study import Cell, Measurement
from torchstone.lab.training import Probe, Trained, Variant
from torchstone.nn.experts.load import RouterLoad, expert_load
from torchstone.recipe.load import load_recipe
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table

METRICS = (
    Metric(name="validation_loss", label="validation loss", unit="nats/byte"),
    Metric(name="load_max", label="load of the busiest expert of a layer, mean over routers", unit="times an even share"),
    Metric(name="load_min", label="load of the idlest expert of a layer, mean over routers", unit="times an even share",
           better="higher"),
    Metric(name="router_entropy", label="entropy of the routers, mean", unit="of ln(experts)", better="neither"),
    Metric(name="dead_experts", label="experts without a token on held-out text, all layers"),
)  # fmt: skip

PARTS = ("feedforward", "mixer")
FREE = tuple(f"model.block.{part}.{name}=0" for part in PARTS for name in ("balance_coef", "z_coef"))

PAPER = (
    PaperFigure(
        setting="sparse against dense",
        paper="mean of the Open LLM leaderboard 53.0 (8.5B parameters, 2.2B active, 1.25T tokens), Llama 2 7B 51.0 (2T tokens)",
        ours="losses of small models at equal training FLOPs, see the verdicts",
        note="the paper varies size, data and training at once and ablates nothing",
    ),
    PaperFigure(
        setting="total and active parameters of JetMoE-8B",
        paper="8.5B, 2.2B active",
        ours="8.52B, 2.26B active and embeddings (by the formula of this implementation)",
    ),
)
NOTES = (
    "FLOPs count the experts that a token uses and the routers; arms of equal FLOPs differ in parameters (see the table).",
    "Loads and entropies are of held-out text after training; curves of them are of the last held-out batch at each evaluation.",
)
CURVES = {"router_entropy": "router entropy", "load_max": "largest load"}  # diagnostics of a router → series


def more(settings: Mapping[str, Any], feedforward: str, attention: str) -> list[Variant]:
    """Arms of the gpu scale: one and four experts per token, and a dense model of as many parameters."""
    heads = settings["heads"]
    found = []
    for count in (1, 4):
        change = [f"model.block.{part}.top_k={count}" for part in PARTS]
        change += [f"model.block.mixer.kv_heads={heads // count}"]
        if count == 1:
            change = [f"model.block.{part}.router=softmax-topk" for part in PARTS] + change
        note = f"{count} expert(s) per token and half, as many query heads in all"
        found.append(Variant(f"smoe-moa-k{count}", (feedforward, attention, *change), note=note))
    dense = (
        f"model.block.feedforward={{kind: swiglu, hidden: {settings['hidden']}}}",
        f"model.block.mixer={{kind: attention, heads: null, kv_heads: {heads // 2}}}",
    )
    note = "dense, with as many parameters in all as smoe-moa, and more FLOPs"
    return [*found, Variant("dense-total", dense, "control", note, on="params", against="smoe-moa")]


@torch.no_grad()
def probe(trained: Trained) -> Probe:
    """Load on held-out text, and curves of the routers' own numbers; nothing for a dense model."""
    block = trained.recipe.model.block
    if not any(hasattr(part, "num_experts") for part in (block.mixer, block.feedforward)):
        return Probe()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, windows = trained.model.to(device), trained.cell.settings["windows"]
    batches = (batch.tokens_bt.to(device) for batch in trained.data.evaluation(16, windows))
    loads = expert_load(model, ((tokens_bt, torch.zeros_like(tokens_bt)) for tokens_bt in batches), classes=1)
    extra = {load.name: [round(value, 4) for value in load.load().tolist()] for load in loads}
    return Probe(load_metrics(loads), series=_curves(trained.summary.history["validation"]), extra={"load": extra})


def load_metrics(loads: Sequence[RouterLoad]) -> dict[str, float]:
    """Metrics of all routers of a model."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return {
        "load_max": mean([float(load.load().max()) for load in loads]),
        "load_min": mean([float(load.load().min()) for load in loads]),
        "router_entropy": mean([load.mean_entropy() / math.log(load.counts_ce.shape[1]) for load in loads]),
        "dead_experts": float(sum(len(load.dead()) for load in loads)),
    }


def _curves(history: Mapping[str, Sequence[float]]) -> dict[str, Series]:
    """Mean over routers of what they say of themselves at each evaluation."""
    axes = {axis: tuple(history[axis]) for axis in ("steps", "tokens")}
    found = {}
    for name, title in CURVES.items():
        rows = [values for key, values in history.items() if key.endswith(name) and "/" in key]
        means = tuple(sum(column) / len(column) for column in zip(*rows, strict=True))
        found[title] = Series(axes=axes, values=means)
    return found


def _by_arm(cells: Sequence[tuple[Cell, Measurement]]) -> dict[str, list[tuple[Cell, Measurement]]]:
    rows: dict[str, list[tuple[Cell, Measurement]]] = {}
    for cell, measurement in cells:
        if not cell.arm.name.startswith("phases."):
            rows.setdefault(cell.arm.name, []).append((cell, measurement))
    return rows


def size_table(cells: Sequence[tuple[Cell, Measurement]]) -> Table:
    """Parameters, cost, loss and load of every arm, means over seeds."""
    names = tuple(metric.name for metric in METRICS)
    rows = []
    for arm, found in _by_arm(cells).items():
        counts = counts_of(load_recipe(found[0][0].arm.settings["recipe"]))
        means = []
        for name in names:
            values = [one.metrics[name] for _, one in found if name in one.metrics]
            means.append(round(sum(values) / len(values), 4) if values else None)
        flops = round(counts.training_flops_per_token)
        rows.append((arm, counts.parameters, counts.active_parameters, flops, *means))
    return Table(
        title="Size, cost and load",
        columns=("arm", "parameters", "active parameters", "training FLOPs per token", *names),
        rows=tuple(rows),
        note="Means over seeds. Active parameters are those that one token uses; loads relative to an even share.",
    )


def figures(cells: Sequence[tuple[Cell, Measurement]]) -> tuple[Figure, ...]:
    """Entropy of the routers and load of the busiest expert during training."""
    return tuple(
        Figure(title=title.capitalize(), x_label="step", y_label=title, lines=lines, note="mean and range over seeds")
        for title in CURVES.values()
        if (lines := _lines(cells, title))
    )


def _lines(cells: Sequence[tuple[Cell, Measurement]], title: str) -> tuple[Line, ...]:
    lines = []
    for arm, found in _by_arm(cells).items():
        curves = [one.series[title] for _, one in found if title in one.series]
        if curves:
            columns: list[Any] = list(zip(*(curve.values for curve in curves), strict=True))
            lines.append(
                Line(
                    name=arm,
                    x=curves[0].axes["steps"],
                    y=tuple(sum(column) / len(column) for column in columns),
                    low=tuple(map(min, columns)),
                    high=tuple(map(max, columns)),
                )
            )
    return tuple(lines)
