"""Numbers, tables and the paper's figures of the study of p-RoPE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.rotary.frequency_usage import frequency_usage
from torchstone.diagnose.rotary.offset_heads import offset_heads
from torchstone.diagnose.rotary.rope_usage_tables import mean_energy, mean_share, usage_shares
from torchstone.diagnose.rotary.theory import constructed_attention, constructed_logits, measured_reach, semantic_reach
from torchstone.diagnose.subject import Subject
from torchstone.evals.extrapolation import extrapolation, held_out_windows
from torchstone.lab.study import Cell, Measurement
from torchstone.lab.training import Probe, Trained
from torchstone.nn.position.base import PositionContext
from torchstone.nn.position.rotary import Rotary
from torchstone.recipe.fingerprint import device_class
from torchstone.recipe.load import load_recipe
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Table

Cells = Sequence[tuple[Cell, Measurement]]
Row = tuple[str | float | int | None, ...]

MULTIPLES = (1, 2, 4, 8)
LAST = 32
BATCH = 32
METRICS = (
    Metric(name="validation_loss", label="validation loss", unit="nats/token", better="lower"),
    *(Metric(name=f"last_loss_{m}x", label=f"loss on the same last tokens, {m}T of context", unit="nats/token")
      for m in MULTIPLES),
    Metric(name="slope", label="slope of that loss from T to 8T", unit="nats/doubling"),
    Metric(name="slow_share", label="q·k usage in the slowest quarter of the pairs", better="neither"),
    Metric(name="fast_share", label="q·k usage in the fastest quarter of the pairs", better="neither"),
    Metric(name="slow_values", label="squared norm of values in the slowest quarter", better="neither"),
    Metric(name="offset_heads", label="heads with 0.9 of their weight on one offset", better="neither"),
    Metric(name="copy_accuracy", label="accuracy of previous-token copy at T", better="higher"),
    Metric(name="copy_far_accuracy", label="accuracy of previous-token copy at 8T", better="higher"),
    Metric(name="match_accuracy", label="accuracy of key match, gaps up to T", better="higher"),
    Metric(name="match_far_accuracy", label="accuracy of key match, gaps up to 8T", better="higher"),
)  # fmt: skip
# Validation perplexity of Gemma 2B from scratch on Wiki and FlanV2, one seed; our arm's name → the paper's.
PAPER = {
    "nope": ("NoPE", 4.8594, 6.6429),
    "rope": ("RoPE, base 10k", 4.4627, 6.4429),
    "rope-large": ("RoPE, base 500k", 4.4485, 6.4593),
    "reversed-0.75": ("0.75 reversed", 4.4592, 6.4683),
    "partial-0.75": ("0.75 partial", 4.4537, 6.4562),
    "p-0.25": ("0.25 p-RoPE", 4.5302, 6.5111),
    "p-0.75": ("0.75 p-RoPE", 4.4414, 6.4422),
}


def text_numbers(trained: Trained) -> Probe:
    """Loss on the same last tokens at T … 8T, and which frequencies the model uses, on held-out text."""
    settings, data = trained.cell.settings, trained.recipe.data
    subject = open_subject(trained.model, device=device_class())
    lengths = [multiple * settings["length"] for multiple in MULTIPLES]
    windows = held_out_windows(data, lengths[-1], settings["windows"])
    found = extrapolation(subject, windows, lengths, last=LAST)
    metrics = {
        f"last_loss_{multiple}x": found.means[length] for multiple, length in zip(MULTIPLES, lengths, strict=True)
    }
    metrics["slope"] = float(found.slopes_n.mean())
    used, extra = usage_numbers(subject, windows.tokens_nt.to(subject.device)[:BATCH, -settings["length"] :])
    return Probe(metrics | used, extra=extra)


def probe_numbers(trained: Trained) -> Probe:
    """Accuracy of a probe at the training length and at 8 times it, and which frequencies the model uses."""
    name = {"previous-copy": "copy", "key-match": "match"}[trained.recipe.data.kind]
    count, length = trained.cell.settings["evaluate"], MULTIPLES[-1] * trained.cell.settings["length"]
    subject = open_subject(trained.model, device=device_class())
    found = {
        f"{name}_accuracy": accuracies(trained, trained.data.evaluation(BATCH, count)),
        f"{name}_far_accuracy": accuracies(trained, trained.data.evaluation(BATCH, count, length=length)),
    }
    tokens_bt = next(trained.data.evaluation(BATCH, BATCH)).tokens_bt.to(subject.device)
    used, extra = usage_numbers(subject, tokens_bt)
    items = {metric: {f"row {row}": value for row, value in enumerate(values)} for metric, values in found.items()}
    return Probe({metric: fmean(values) for metric, values in found.items()} | used, items, extra=extra)


@torch.no_grad()
def accuracies(trained: Trained, batches: Iterable[Batch]) -> list[float]:
    """Share of right answers in every row; rows have equally many."""
    objective, rows = trained.recipe.objective.build(), []
    for batch in batches:
        placed = batch.to(device_class())
        correct_b = objective(trained.model, placed).correct_bt.sum(dim=1)
        rows += (correct_b / (placed.targets_bt != IGNORE).sum(dim=1)).tolist()
    return rows


def usage_numbers(subject: Subject, tokens_bt: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of frequency usage, and the share of every pair; nothing for a model that does not turn."""
    if subject.layers[0].rotation is None:
        return {}, {}
    usage = frequency_usage(subject, tokens_bt)
    metrics = {name: mean_share(usage, f"{name}_u") for name in ("slow_share", "fast_share")}
    metrics["slow_values"] = mean_energy(usage)[2]
    metrics["offset_heads"] = float(len(offset_heads(usage)))
    return metrics, {"usage": torch.stack([usage_shares(layer) for layer in usage]).mean(dim=0).tolist()}


def means(cells: Cells, metric: str) -> dict[str, float]:
    """Arm → mean over seeds, for the arms that have the metric."""
    found: dict[str, list[float]] = {}
    for cell, measurement in cells:
        if metric in measurement.metrics:
            found.setdefault(cell.arm.name, []).append(measurement.metrics[metric])
    return {arm: fmean(values) for arm, values in found.items()}


def tables(cells: Cells) -> tuple[Table, ...]:
    """The exact part, then what every arm turns, uses and can do."""
    return (theory_table(), ladder_table(cells), usage_table(cells), probe_table(cells))


def theory_table() -> Table:
    """Statements of the paper that need no training, each computed by turning vectors."""
    base = 100.0
    ladder = [base ** (-m / 8) for m in range(8)]
    rows: list[tuple[str, float | None, float]] = []
    for amplitude, printed in ((64.0, 0.638), (1024.0, 0.99999)):
        weight = float(constructed_attention(amplitude, [1.0], 24)[-1, -1])
        rows.append((f"Thm 5.3: weight on itself, one frequency, norm² {amplitude:g}, 24 tokens", printed, weight))
    several = float(constructed_attention(64.0, ladder, 24)[-1, -1])
    rows.append(("the same, norm² 64 spread over 8 frequencies (base 100)", None, several))
    before = float(constructed_attention(1024.0, [1.0], 24, back=1)[-1, -2])
    rows.append(("Thm 5.3: weight on the token before, norm² 1024", None, before))
    still = float(constructed_attention(1024.0, [0.0], 3)[2, 2])
    rows.append(("Prop. 5.2: the same head without rotation, 3 equal tokens", 1 / 3, still))
    for gap in (6, 19, 44):
        near = float(constructed_logits(1.0, [1.0], gap + 1)[gap, 0])
        rows.append((f"near return of frequency 1 after {gap} tokens", math.cos(gap), near))
    for frequency in (1.0, 0.1, ladder[-1], 0.001):
        reach = float(measured_reach(frequency, 1000))
        rows.append((f"tokens with a match within 5 %, frequency {frequency:.3g}", semantic_reach(frequency), reach))
    rows.append(("Thm 6.1: the same, a pair that does not turn (1000 tried)", None, float(measured_reach(0.0, 1000))))
    return Table(
        title="Exact part: what the theory says and what turning vectors gives",
        columns=("statement", "theory", "computed"),
        rows=tuple((name, None if t is None else float(f"{t:.5g}"), float(f"{c:.5g}")) for name, t, c in rows),
        note="The reach of a match is arccos(0.95)/g ≈ 0.318/g tokens, computed in whole tokens.",
    )


def ladder_table(cells: Cells) -> Table:
    """What turns in every arm, and how far over the training window."""
    rows: list[Row] = []
    for arm in {cell.arm.name: cell.arm for cell, _ in cells}.values():
        recipe = load_recipe(arm.settings["recipe"])
        if recipe.data.kind != "text":
            continue  # probes repeat the ladders of the text arms
        length, head_dim = recipe.data.sequence_length(), recipe.model.head_dim
        part: Any = recipe.model.block.mixer.position
        position = part.build(PositionContext(head_dim, 1, length))
        if not isinstance(position, Rotary):
            rows.append((arm.name, None, 0, None, None))
            continue
        turning = [frequency for frequency in position.frequencies().tolist() if frequency]
        last = length * part.base ** (-2 * (head_dim // 2 - 1) / head_dim)
        rows.append((arm.name, part.base, len(turning), float(f"{length * min(turning):.4g}"), float(f"{last:.4g}")))
    return Table(
        title="How far the pairs turn over the training window",
        columns=(
            "arm",
            "base",
            "pairs that turn",
            "T·g of the slowest that turns, rad",
            "T·g of the full ladder's last",
        ),
        rows=tuple(rows),
        note="Where the last column is far below 1, dropping the slowest pairs changes next to nothing.",
    )


def usage_table(cells: Cells) -> Table:
    """Share of the q·k usage of every pair, by arm, mean over seeds and layers."""
    found: dict[str, list[list[float]]] = {}
    for cell, measurement in cells:
        if "usage" in measurement.extra:
            found.setdefault(cell.arm.name, []).append(measurement.extra["usage"])
    pairs = max((len(rows[0]) for rows in found.values()), default=0)
    rows: tuple[Row, ...] = tuple(
        (arm, *(round(fmean(column), 4) for column in zip(*shares, strict=True))) for arm, shares in found.items()
    )
    return Table(
        title="Share of q·k usage by pair",
        columns=("arm", *(f"pair {pair}" for pair in range(pairs))),
        rows=rows,
        note="Pair 0 is the fastest of the full ladder; after training, on held-out rows.",
    )


def probe_table(cells: Cells) -> Table:
    """Accuracies of both probes, and what heads do in the model that copies; means over seeds."""
    names = ("copy_accuracy", "copy_far_accuracy", "match_accuracy", "match_far_accuracy")
    columns = [(name.partition("_")[0], means(cells, name)) for name in names]
    columns += [("copy", means(cells, name)) for name in ("offset_heads", "fast_share")]
    encodings = dict.fromkeys(arm.partition(".")[2] for _, found in columns[:4] for arm in found)
    rows: tuple[Row, ...] = tuple(
        (encoding, *(_rounded(found.get(f"{probe}.{encoding}")) for probe, found in columns)) for encoding in encodings
    )
    return Table(
        title="Probes: means over seeds",
        columns=(
            "encoding", "copy at T", "copy at 8T", "match, gaps to T", "match, gaps to 8T",
            "offset heads after copy", "fast share after copy",
        ),
        rows=rows,
        note="Accuracy, trained at T; chance is 1/16 for copy and 1/4 for match. Copying is what offset heads are for: the "
        "analysis should find some where copy succeeds. Fast share: of the q·k usage, in the fastest quarter of the pairs.",
    )  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def length_figure(cells: Cells, length: int) -> Figure:
    """Loss on the same last tokens against context, one line per text arm."""
    by_multiple = [means(cells, f"last_loss_{multiple}x") for multiple in MULTIPLES]
    x = tuple(float(multiple * length) for multiple in MULTIPLES)
    lines = tuple(Line(name=arm, x=x, y=tuple(found[arm] for found in by_multiple)) for arm in by_multiple[0])
    return Figure(
        title="Loss on the same last tokens with more context",
        x_label="tokens of context",
        y_label="nats per token",
        log_x=True,
        lines=lines,
        note=f"Mean over seeds; trained at {length} tokens.",
    )


def beside(cells: Cells) -> tuple[PaperFigure, ...]:
    """The paper's perplexities as differences to RoPE in nats, and ours."""
    ours = means(cells, "validation_loss")
    base_wiki, base_flan = PAPER["rope"][1:]
    figures = []
    for arm, (name, wiki, flan) in PAPER.items():
        if arm == "rope":
            continue
        shown = f"{ours[arm] - ours['rope']:+.4f}" if arm in ours and "rope" in ours else "–"
        figures.append(
            PaperFigure(
                setting=f"{name}: loss minus RoPE's, nats",
                paper=f"{math.log(wiki / base_wiki):+.4f} Wiki, {math.log(flan / base_flan):+.4f} Flan (2B, one seed)",
                ours=shown,
            )
        )
    return tuple(figures)
