"""What every arm of a comparison shows beside its loss: recall, and what a token costs to generate after a long context.

Recall is the loss on AR-hits, held-out tokens that their own context predicts (`torchstone.evals.ar_loss`); a task with exact
answers has its accuracy instead. Generation is measured right after training, on the arm's own model, at `FACTOR` times the
training length: time, FLOPs and bytes of the decoding state.

Pitfall: FLOPs and bytes are exact; the time is taken while other cells run (on one CPU thread it is that thread's processor
time), so only large differences mean anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torchstone.errors import DataError
from torchstone.lab.study import Cell, Measurement
from torchstone.report import numbers
from torchstone.report.result import Metric, Table

FACTOR, STEPS, WARM = 4, 16, 4
RECALL = Metric(name="recall_loss", label="loss on in-context recall", unit="nats/token", better="lower")
KEY = "decoding"


def recall(recipe: Any, model: Any, data: Any) -> dict[str, float]:
    """The recall metric of a trained model; none where the data is no text, or its held-out part has no such token."""
    from torchstone.evals.ar_loss import ar_losses

    if not recalls(recipe):
        return {}
    try:
        found = ar_losses(model, recipe.objective.build(), data, recipe.evaluation.sequences)
    except DataError:
        return {}
    return {RECALL.name: found["ar_hit_loss"]}


def recalls(recipe: Any) -> bool:
    """Whether arms of this recipe have the recall metric: they learn to predict the next token of text."""
    return recipe.data.kind == "text" and recipe.objective.kind == "next-token"


def decoding_numbers(model: Any) -> dict[str, float]:
    """Cost of one more token after `FACTOR` times the training length."""
    import torch

    from torchstone.evals.decoding import decoding_costs, decoding_flops

    context = max(FACTOR * model.length, STEPS + WARM + 1)
    alone = model.embed.weight.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter  # one thread's own time does not count who else runs
    (cost,) = decoding_costs(model, [context], steps=STEPS, warm=WARM, clock=clock)
    return {
        "context": context,
        "milliseconds": cost.milliseconds,
        "flops": decoding_flops(model, context),
        "state_bytes": cost.state_bytes,
    }


def decoding_table(cells: Sequence[tuple[Cell, Measurement]], baseline: str) -> tuple[Table, ...]:
    """Arms × costs of generation, means over cells, each with its ratio to the baseline's; none if no cell has them."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for cell, measurement in cells:
        if KEY in measurement.extra:
            found.setdefault(cell.arm.name, []).append(measurement.extra[KEY])
    if not found:
        return ()
    means = {
        arm: {name: statistics.fmean(row[name] for row in rows) for name in rows[0]} for arm, rows in found.items()
    }
    shows = {
        "milliseconds": ("time per token", lambda value: f"{value:.3g} ms"),
        "flops": ("FLOPs per token", numbers.quantity),
        "state_bytes": ("state per sequence", numbers.size),
    }
    rows = tuple(
        (
            arm,
            *(_with_ratio(values[name], means.get(baseline, {}).get(name), show) for name, (_, show) in shows.items()),
        )
        for arm, values in means.items()
    )
    contexts = " or ".join(f"{int(context):,}" for context in sorted({values["context"] for values in means.values()}))
    return (
        Table(
            title="Cost of generating a token",
            columns=("arm", *(head for head, _ in shows.values())),
            rows=rows,
            note=f"After {contexts} tokens of context ({FACTOR} times the training length), one sequence at a time, in the "
            "type of the weights, means over cells. Times were measured after each cell's training on a machine that other cells "
            "shared (processor time, where a cell has one CPU thread); FLOPs and bytes are exact.",
        ),
    )


def _with_ratio(value: float, base: float | None, show: Any) -> str:
    shown: str = show(value)
    return shown if not base or value == base else f"{shown} (×{value / base:.2f})"
