"""Numbers, tables and figures of the study of RecurrentGemma."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.data.synthetic.far_tag import FarTag
from torchstone.evals.extrapolation import Losses, extrapolation, held_out_windows
from torchstone.lab.study import Cell, Measurement
from torchstone.lab.training import Probe, Trained
from torchstone.nn.recurrence.rglru import RGLRU
from torchstone.recipe.fingerprint import device_class
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table

Cells = Sequence[tuple[Cell, Measurement]]

MULTIPLES = (1, 2, 4, 8)
STATE_LENGTHS = (128, 512, 2048, 8192)
ARMS = {
    "global": "multi-query attention over the whole past",
    "local": "multi-query attention over a window",
    "hawk": "recurrent blocks only",
    "griffin": "two recurrent blocks, one local attention block, repeated",
}
METRICS = (
    *(Metric(name=f"loss_{n}x", label=f"loss on the same last tokens, {n}T of context", unit="nats/token")
      for n in MULTIPLES),
    Metric(name="rise", label="that loss at 8T minus at T", unit="nats/token"),
    Metric(name="foreign_gap", label="loss with foreign far context minus with own", unit="nats/token", better="higher"),
    Metric(name="validation_loss", label="validation loss", unit="nats/token"),
    Metric(name="accuracy", label="accuracy (far, recall: of the task)", better="higher"),
    Metric(name="beyond_accuracy", label="accuracy at markers that stacked windows cannot reach", better="higher"),
    Metric(name="state_kib", label="decoding state of 8192 tokens, fp32", unit="KiB", better="neither"),
)  # fmt: skip
PAPER = (
    PaperFigure(
        setting="RecurrentGemma-2B (2T tokens) against Gemma-2B (3T), average of 18 tasks", paper="44.6 against 45.0"
    ),
    PaperFigure(setting="the same, MMLU", paper="38.4 against 42.3", note="recall of facts is behind"),
    PaperFigure(setting="the same, GSM8K", paper="13.4 against 17.7"),
    PaperFigure(setting="RecurrentGemma-9B (2T) against Gemma-7B (6T), average", paper="56.1 against 56.9"),
    PaperFigure(
        setting="Griffin beyond its training length", paper="loss keeps falling or stays", note="De et al., section 6.1"
    ),
    PaperFigure(setting="Griffin: copy and retrieval beyond the window", paper="behind global attention"),
)
NOTES = (
    "All context lengths predict the same last tokens of the same windows, each inside one document.",
    "FLOPs count attention in full: local attention costs less than its number where a kernel skips what is masked.",
    "The paper compares models of 2 and 9 billion parameters on benchmarks; nothing here measures that.",
)


def text_numbers(trained: Trained) -> Probe:
    """Loss of the same last tokens at T … 8T, with own and foreign far context."""
    data, length = trained.recipe.data, trained.recipe.data.sequence_length()
    lengths = [multiple * length for multiple in MULTIPLES]
    windows = held_out_windows(data, lengths[-1], trained.cell.settings["windows"])
    losses, last = losses_of(trained), length // 2
    own = extrapolation(losses, windows, lengths, last=last)
    foreign = extrapolation(losses, windows, lengths[-1:], last=last, near=length)
    metrics = {f"loss_{multiple}x": own.means[multiple * length] for multiple in MULTIPLES}
    metrics["rise"] = metrics["loss_8x"] - metrics["loss_1x"]
    metrics["foreign_gap"] = foreign.means[lengths[-1]] - own.means[lengths[-1]]
    sizes = state_bytes(trained.model)
    metrics["state_kib"] = sizes[-1] / 1024
    series = Series(axes={"context length": tuple(map(float, lengths))}, values=tuple(own.means.values()))
    extra = {"state_bytes": sizes, "decays": decays(trained.model)}
    return Probe(metrics, series={"same-token loss": series}, extra=extra)


def losses_of(trained: Trained) -> Losses:
    """A function of (tokens [b, t], last) that gives the losses of the last targets."""
    objective, model = trained.recipe.objective.build(), trained.model.to(device_class())

    @torch.no_grad()
    def losses(tokens_bt: Tensor, last: int) -> Tensor:
        batch = Batch(tokens_bt[:, :-1], tokens_bt[:, 1:]).to(device_class())
        kept: Tensor = objective(model, batch).per_token_bt[:, -last:]
        return kept.cpu()

    return losses


@torch.no_grad()
def task_numbers(trained: Trained) -> Probe:
    """For the far tag, accuracy at markers further away than windows reach through all layers."""
    if not isinstance(trained.data, FarTag):
        return Probe()
    reach = trained.cell.settings["task_depth"] * (trained.cell.settings["task_window"] - 1)
    beyond_t = (trained.data.distances() > reach).to(device_class())
    objective, model = trained.recipe.objective.build(), trained.model.to(device_class())
    batches = (batch.to(device_class()) for batch in trained.data.evaluation(64, 256))
    right = [objective(model, batch).correct_bt[:, beyond_t].double().mean() for batch in batches]
    return Probe({"beyond_accuracy": float(torch.stack(right).mean())})


def state_bytes(model: Any) -> list[int]:
    """Bytes of the decoding state of one row after STATE_LENGTHS tokens."""
    return [model.new_state(1, length, device="meta", dtype=torch.float32).nbytes() for length in STATE_LENGTHS]


def decays(model: Any) -> list[list[float]]:
    """For every recurrent layer, sorted: what channels keep per token while their gate is half open."""
    units = [module for module in model.modules() if isinstance(module, RGLRU)]
    return [sorted(unit.decays().tolist()) for unit in units]


def _by_arm(cells: Cells) -> dict[str, list[Measurement]]:
    rows: dict[str, list[Measurement]] = {}
    for cell, measurement in cells:
        rows.setdefault(cell.arm.name, []).append(measurement)
    return rows


def _mean(found: Sequence[Measurement], metric: str) -> float | None:
    values = [one.metrics[metric] for one in found if metric in one.metrics]
    return fmean(values) if values else None


def tables(cells: Cells) -> tuple[Table, ...]:
    """Every task by arm, and state sizes."""
    rows = _by_arm(cells)
    shown = {
        "": ("loss_1x", "loss_8x", "rise", "foreign_gap"),
        "far.": ("accuracy", "beyond_accuracy"),
        "recall.": ("accuracy",),
    }
    summary = tuple(
        (arm, *(_mean(rows.get(task + arm, ()), metric) for task, metrics in shown.items() for metric in metrics))
        for arm in ARMS
    )
    heads = ("arm", "T", "8T", "8T − T", "foreign − own", "far tag", "beyond reach", "recall")
    sizes = tuple((arm, *(size / 1024 for size in rows[arm][0].extra["state_bytes"])) for arm in ARMS if arm in rows)
    return (
        Table(
            title="What each arm can do",
            columns=heads,
            rows=summary,
            note="text: nats per token on the same last tokens; tasks: accuracy; mean over seeds",
        ),
        Table(
            title="Decoding state of one row (KiB, fp32)",
            columns=("arm", *(f"{length} tokens" for length in STATE_LENGTHS)),
            rows=sizes,
            note="of the text models",
        ),
    )


def figures(cells: Cells) -> tuple[Figure, ...]:
    """Loss by context, state by length, decay spectra."""
    rows = _by_arm(cells)
    loss, sizes = [], []
    for arm in (arm for arm in ARMS if arm in rows):
        curves = [one.series["same-token loss"] for one in rows[arm]]
        columns = [
            [value for value in column if value is not None] for column in zip(*(c.values for c in curves), strict=True)
        ]
        band = {"low": tuple(map(min, columns)), "high": tuple(map(max, columns))}
        loss.append(Line(name=arm, x=curves[0].axes["context length"], y=tuple(map(fmean, columns)), **band))
        kib = tuple(size / 1024 for size in rows[arm][0].extra["state_bytes"])
        sizes.append(Line(name=arm, x=STATE_LENGTHS, y=kib))
    return (
        Figure(
            title="Loss by context",
            x_label="context length (tokens)",
            y_label="loss on the last tokens (nats)",
            log_x=True,
            lines=tuple(loss),
            note="mean and range over seeds",
        ),
        Figure(
            title="Decoding state",
            x_label="tokens",
            y_label="KiB of one row",
            log_x=True,
            log_y=True,
            lines=tuple(sizes),
        ),
        *(_spectrum(arm, rows[arm][0]) for arm in ("hawk", "griffin") if arm in rows),
    )


def _spectrum(arm: str, measurement: Measurement) -> Figure:
    """Decays of every recurrent layer of one model, from the fastest channel to the slowest."""
    lines = [
        Line(name=f"recurrent layer {number}", x=tuple(i / len(row) for i in range(len(row))), y=tuple(row))
        for number, row in enumerate(measurement.extra["decays"])
    ]
    return Figure(
        title=f"Decay spectrum of {arm}",
        x_label="share of channels",
        y_label="share of the state kept per token",
        lines=tuple(lines),
        note="first seed; recurrence gates half open",
    )
