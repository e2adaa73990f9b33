"""Cells of the TokenFormer study whose model grows on the way, their curves, and the tables of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchstone.errors import DataError, InterruptedRun
from torchstone.lab.study import Arm, Cell, Measurement
from torchstone.lab.training import STREAM, thinned
from torchstone.models.growth import token_usage, usage_histogram
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.events import read_history
from torchstone.train.growth import AppendTokens, AppendUnits, Plan, grow_run
from torchstone.train.loop import Callback, RunView
from torchstone.train.names import GROWTH
from torchstone.train.precision import Compute
from torchstone.train.run import RunSummary, load_run, train
from torchstone.train.signals import Stop

EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0)
CURVE = "validation loss against all FLOPs"
METRICS = (
    Metric(name="validation_loss", label="validation loss at the end", unit="nats/token"),
    Metric(name="logit_change", label="largest change of a logit at growth, relative", better="neither"),
    Metric(name="jump", label="loss after growth minus before", unit="nats/token", better="neither"),
    Metric(name="new_usage", label="use of new tokens at the end (1: like the others)", better="neither"),
)
PAPER = (
    PaperFigure(setting="OpenWebText perplexity, 354M grown to 757M in 60k steps", paper="10.9"),
    PaperFigure(setting="Transformer of 757M from scratch, 60k / 120k / 600k steps", paper="12.0 / 11.3 / 10.5"),
    PaperFigure(
        setting="Pile perplexity, 150M / 450M / 900M / 1.5B", paper="10.45 / 8.28 / 7.38 / 6.91",
        note="against Pythia models of about that size",
    ),
)  # fmt: skip
NOTES = (
    "FLOPs are counted over the whole history of a model: tokens before growth at the small model's price.",
    "The published growth runs do not say which of the four initialisations they used, and restarted optimizer and schedule; "
    "here moments are carried and one cosine spans the whole training of every arm.",
)


CHOICES = {f"{keys}-{tau}": (keys, tau) for keys in ("zero", "random") for tau in ("fixed", "following")}


def tokens(attention: int, feedforward: int, mode: str = "") -> tuple[str, str]:
    """The lines that set the parameter tokens."""
    return (
        f"model.block.projection={{kind: pattention, input_tokens: {attention}, output_tokens: {attention}{mode}}}",
        f"model.block.feedforward={{kind: pattention, tokens: {feedforward}{mode}}}",
    )


def mlp(hidden: int) -> tuple[str, str]:
    """The lines that make it an ordinary Transformer."""
    return "model.block.projection=linear", f"model.block.feedforward={{kind: mlp, hidden: {hidden}}}"


def with_growth(arms: Sequence[Arm], step: int) -> list[Arm]:
    """The arms, of which some grow after a step: what they append, and the model that they become."""
    recipes = {arm.name: arm.settings["recipe"] for arm in arms}
    growth: dict[str, dict[str, Any]] = {
        name: {"unit": "parameter tokens", "keys": keys, "tau": tau, "into": "large"}
        for name, (keys, tau) in CHOICES.items()
    }
    growth["mlp-grown"] = {"unit": "hidden units", "into": "mlp-large"}
    return [
        Arm(arm.name, arm.role, arm.note, {**arm.settings, "growth": _growth(growth[arm.name], recipes, step)})
        if arm.name in growth
        else arm
        for arm in arms
    ]


def _growth(growth: Mapping[str, Any], recipes: Mapping[str, Any], step: int) -> dict[str, Any]:
    return {**growth, "step": step, "into": recipes[growth["into"]]["model"]}


def as_it_ends(arm: Arm) -> Arm:
    """The arm with the model that it ends as."""
    if "growth" not in arm.settings:
        return arm
    recipe = {**arm.settings["recipe"], "model": arm.settings["growth"]["into"]}
    return Arm(arm.name, arm.role, arm.note, {**arm.settings, "recipe": recipe})


class _HaltAt(Callback):
    """Stops a run after the evaluation at a step, with a checkpoint there."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, Stop()

    def on_evaluation(self, view: RunView) -> Mapping[str, float]:
        """Ask for the stop."""
        if view.position.step == self.step:
            self.stop.ask(f"the growth after step {self.step}")
        return {}


def plan_of(growth: Mapping[str, Any], seed: int) -> Plan:
    """What an arm appends."""
    if growth["unit"] == "hidden units":
        return AppendUnits(hidden=growth["into"]["block"]["feedforward"]["hidden"], seed=seed)
    return AppendTokens(2, keys=growth["keys"], tau=growth["tau"], seed=seed)


def grown_cell(cell: Cell) -> Measurement:
    """Train the small model, grow it, train on; a cell that was interrupted goes on where it was.

    Raises:
        DataError: the data changed since the study was prepared.
    """
    growth, small, run = cell.arm.settings["growth"], cell.directory / "small", cell.directory / "run"
    seed = cell.seed + STREAM * cell.arm.settings["stream"]
    recipe = load_recipe(cell.arm.settings["recipe"], [f"seed={seed}"])
    expected, found = cell.prepared["data"][cell.arm.name], recipe.data.build(None).fingerprint
    if found != expected:
        raise DataError(
            f"the data of arm {cell.arm.name} changed since the study was prepared: its fingerprint was {expected}, now it is "
            f"{found}. Restore the files, or choose another --out: cells on different data are never mixed."
        )
    compute = Compute(**cell.prepared["compute"])
    if not (run / "recipe.yaml").exists():
        _train_until(growth["step"], recipe, small, cell, compute)
        grow_run(small, run, plan_of(growth, seed))
    summary = train(run / "recipe.yaml", run, compute=compute, progress=cell.report)
    report = json.loads((run / GROWTH).read_text())["report"]
    metrics = {"logit_change": report["change"], "jump": report["loss"][1] - report["loss"][0]}
    curve = _whole_curve(small, summary, growth["step"])
    usage = _usage(run, report["sizes"]) if growth["unit"] == "parameter tokens" else {}
    metrics |= {"new_usage": usage["mean of new"]} if usage else {}
    return Measurement(
        metrics={**summary.final, **metrics},
        series={CURVE: curve},
        extra={"usage": usage},
        tokens=summary.tokens,
        flops=summary.flops,
        peak_bytes=summary.peak_bytes,
    )


def _train_until(step: int, recipe: Recipe, directory: Path, cell: Cell, compute: Compute) -> None:
    """Train up to a step in the middle of the recipe's budget."""
    store = CheckpointStore(directory / "checkpoints")
    if store.latest() == step:
        return
    halt = _HaltAt(step)
    try:
        train(recipe, directory, compute=compute, progress=cell.report, callbacks=[halt], stop=halt.stop)
    except InterruptedRun:
        if store.latest() != step:  # stopped by someone else
            raise


def _whole_curve(small: Path, summary: RunSummary, step: int) -> Series:
    """Validation loss over all FLOPs, before and after growth."""
    first, _ = read_history(small, step)
    curves = first["validation"], summary.history["validation"]
    axes = {axis: tuple(float(x) for curve in curves for x in curve[axis]) for axis in ("flops", "steps")}
    return Series(axes=axes, values=tuple(loss for curve in curves for loss in curve["loss"]))


def plain_curve(history: Mapping[str, Any]) -> Series:
    """The same for an arm that does not grow."""
    validation = history["validation"]
    kept = thinned(len(validation["loss"]))
    axes = {axis: tuple(float(validation[axis][n]) for n in kept) for axis in ("flops", "steps")}
    return Series(axes=axes, values=tuple(validation["loss"][n] for n in kept))


def _usage(run: Path, sizes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """How much old and new tokens of the trained model contribute: mean of the new ones, and histograms over layers."""
    _, model, data = load_run(run)
    found = token_usage(model, next(iter(data.evaluation(8, 8))))
    old = torch.cat([usage_n[: sizes[name][0]] for name, usage_n in found.items()])
    new = torch.cat([usage_n[sizes[name][0] :] for name, usage_n in found.items()])
    return {
        "mean of new": float(new.mean()),
        "old": usage_histogram(old, EDGES).tolist(),
        "new": usage_histogram(new, EDGES).tolist(),
    }


def _by_arm(cells: Sequence[tuple[Cell, Measurement]]) -> dict[str, list[Measurement]]:
    rows: dict[str, list[Measurement]] = {}
    for cell, measurement in cells:
        rows.setdefault(cell.arm.name, []).append(measurement)
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def tables(cells: Sequence[tuple[Cell, Measurement]]) -> tuple[Table, ...]:
    """What growth did at once and at the end, and how the tokens are used."""
    rows = _by_arm(cells)
    shown = ("logit_change", "jump", "validation_loss", "new_usage")
    grown = tuple(
        (arm, *(_mean([one.metrics[name] for one in found if name in one.metrics]) for name in shown))
        for arm, found in rows.items()
        if "jump" in found[0].metrics
    )
    heads = ("arm", "change of logits", "jump (nats)", "loss at the end", "use of new tokens")
    jump = Table(title="Growth at once and at the end", columns=heads, rows=grown, note="mean over seeds")
    bins = [f"{low:g} to {high:g}" for low, high in zip(EDGES, EDGES[1:], strict=False)] + [f"{EDGES[-1]:g} or more"]
    used = tuple(
        (arm, which, *(_mean(column) for column in zip(*(one.extra["usage"][which] for one in found), strict=True)))
        for arm, found in rows.items()
        if found[0].extra.get("usage")
        for which in ("old", "new")
    )
    note = (
        "share of tokens whose |weight| times value norm, relative to the layer's mean, lies in a bin; mean over seeds"
    )
    return jump, Table(title="Use of parameter tokens", columns=("arm", "tokens", *bins), rows=used, note=note)


def curves(cells: Sequence[tuple[Cell, Measurement]]) -> Figure:
    """Validation loss against all FLOPs; growth is where a curve has two points at the same FLOPs."""
    lines = []
    for arm, found in _by_arm(cells).items():
        series = [one.series[CURVE] for one in found if CURVE in one.series]
        if series:
            columns = list(zip(*(each.values for each in series), strict=True))
            lines.append(
                Line(
                    name=arm,
                    x=series[0].axes["flops"],
                    y=tuple(sum(column) / len(column) for column in columns),
                    low=tuple(map(min, columns)),
                    high=tuple(map(max, columns)),
                )
            )
    return Figure(
        title="Loss against all training FLOPs",
        x_label="training FLOPs, growth included",
        y_label="validation loss (nats)",
        lines=tuple(lines),
        note="mean and range over seeds; a model grows where its curve has two points at the same FLOPs",
    )
