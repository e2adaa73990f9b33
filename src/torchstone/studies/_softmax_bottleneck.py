"""Metrics and tables of the softmax bottleneck's study: data rank of source code, and excess over a known entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchstone.data.cache import cache_folder
from torchstone.data.corpus import Document
from torchstone.data.stdlib import StdlibConfig
from torchstone.data.synthetic.bigram import Bigram
from torchstone.data.tokenizers import BPEConfig
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.bottleneck.anisotropy import anisotropy
from torchstone.diagnose.bottleneck.ngram_rank import (
    NgramMatrix,
    RankCurve,
    count_ngrams,
    fitted_gap,
    noise_counts,
    rank_curve,
)
from torchstone.diagnose.bottleneck.rank_sweep import Training, default_ranks, rank_sweep
from torchstone.diagnose.bottleneck.rank_sweep_states import split_documents
from torchstone.errors import StudyError
from torchstone.lab.study import Arm, Cell, Measurement
from torchstone.lab.training import Trained
from torchstone.recipe.load import load_recipe
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table
from torchstone.storage.hashing import bytes_hash

Cells = Sequence[tuple[Cell, Measurement]]
Row = tuple[str | float | int | None, ...]
CAPPED = "A rank with a gap of 0.01 nats outside the measured ranks counts as the first or the last of them."
PARTS = 4  # disjoint samples of the standard library, about 2 MB each
TEXT = (  # a model of 30 M parameters on text, for one GPU
    "data={kind: text, tokenizer: {kind: bpe, vocab_size: 16384}, length: 512}",
    "model={width: 512, depth: 8, head_dim: 64, block: {feedforward: {kind: swiglu, hidden: 1360}}, "
    "head: {kind: linear, tied: false}, initialisation: {kind: normal, std: 0.02, embedding_std: null, scale_residual: true}}",
    "optimizer={kind: adamw, learning_rate: 0.001}",
    "batch.sequences=128",
)
RANK_64 = "model.head={kind: factored, rank: 64}"
METRICS = (
    Metric(name="excess", label="loss beyond the table's entropy", unit="nats/token", better="lower"),
    Metric(name="rise", label="final validation loss above its best", unit="nats/token", better="lower"),
    Metric(name="anisotropy", label="mean cosine of last hidden states", better="neither"),
    Metric(
        name="critical_rank",
        label="rank with a fitted gap of 0.01 nats, capped at the measured ranks",
        better="neither",
    ),
    Metric(name="gap_16", label="fitted gap at rank 16", unit="nats/token", better="neither"),
    Metric(name="entropy", label="entropy of the n-gram table", unit="nats/token", better="neither"),
    Metric(name="validation_loss", label="validation loss", unit="nats/token", better="lower"),
)


def is_text(arm: Arm) -> bool:
    """Whether an arm measures n-grams and trains nothing."""
    return "tokens" in arm.settings


def text_arms(settings: Mapping[str, Any]) -> list[Arm]:
    """Bytes and byte pairs, and for each the same counts without structure."""
    s = settings
    of = {"bytes": ("three bytes of context", 3, s["byte_contexts"], s["byte_ranks"]),
          "bpe": ("one token of context, about three bytes", 1, s["bpe_contexts"], s["bpe_ranks"])}  # fmt: skip
    return [
        Arm(
            f"{tokens}{'-noise' if noise else ''}",
            "control" if noise or tokens == "bytes" else "arm",
            f"{note}; next tokens drawn whatever the context" if noise else note,
            {
                "tokens": tokens,
                "order": order,
                "top": top,
                "ranks": list(ranks),
                "noise": noise,
                "megabytes": s["megabytes"],
            },
        )
        for tokens, (note, order, top, ranks) in of.items()
        for noise in (False, True)
    ]


def tokenizer_of(cache: Path | None = None) -> Any:
    """Byte pairs with 1024 ids, trained on the whole standard library."""
    corpus = StdlibConfig().build()
    return BPEConfig(vocab_size=1024).build(corpus.documents, corpus.fingerprint, cache_folder(cache))


def sample(seed: int, megabytes: float) -> list[Document]:
    """Documents of one part of the standard library, up to a size; parts share no document.

    Raises:
        StudyError: there are only PARTS parts.
    """
    if not 0 <= seed < PARTS:
        raise StudyError(
            f"the corpus gives {PARTS} disjoint samples, so n-gram arms have seeds 0 to {PARTS - 1}, not {seed}."
        )
    ranked = sorted(StdlibConfig().build().documents(), key=lambda document: bytes_hash(document.id.encode()))
    chosen, size = [], 0.0
    for document in ranked[seed::PARTS]:
        if size < megabytes * 1e6:
            chosen.append(document)
            size += len(document.text.encode())
    return chosen


def measure_text(cell: Cell) -> Measurement:
    """Rank curve of one sample's next-token table."""
    s = cell.arm.settings
    documents = sample(cell.seed, s["megabytes"])
    if s["tokens"] == "bytes":
        tokens = [list(document.text.encode()) for document in documents]
    else:
        tokens = tokenizer_of().encode_batch([document.text for document in documents])
    counts_cv = count_ngrams(tokens, s["order"], s["top"])
    curve = rank_curve(noise_counts(counts_cv, cell.seed) if s["noise"] else counts_cv, s["ranks"])
    return Measurement(
        metrics={
            "critical_rank": censored(curve),
            "gap_16": curve.fitted[curve.ranks.index(16)],
            "entropy": curve.entropy,
        },
        series={"fitted gap": Series(axes={"rank": curve.ranks}, values=curve.fitted)},
        extra={"truncated": curve.truncated, "tail": curve.tail, "shape": [curve.contexts, curve.tokens]},
    )


def censored(curve: RankCurve) -> float:
    """The critical rank; the first or last rank where it lies outside the measured ones."""
    if curve.critical is not None:
        return curve.critical
    return float(curve.ranks[-1] if curve.fitted[-1] > 0.01 else curve.ranks[0])


def excess_of(trained: Trained) -> dict[str, float]:
    """What the model loses against the table, exactly, on held-out sequences; and how alike its last states are."""
    data: Bigram = trained.data
    total, count, states = 0.0, 0, []
    with torch.no_grad():
        for batch in data.evaluation(32, trained.cell.settings["evaluate"]):
            hidden_btd = trained.model(batch.tokens_bt).hidden_btd
            total += float(data.excess(batch.tokens_bt, trained.model.logits(hidden_btd)).sum())
            count += batch.tokens_bt.numel()
            states.append(hidden_btd.flatten(0, 1))
    losses = trained.summary.history["validation"]["loss"]
    return {
        "excess": total / count,
        "rise": losses[-1] - min(losses),
        "anisotropy": anisotropy(torch.cat(states), "last hidden states"),
    }


def sweep_of(trained: Trained) -> dict[str, Series]:
    """Gap of heads of falling rank on the frozen model, on texts of the standard library."""
    subject = open_subject(trained.model, tokenizer=trained.data.tokenizer)
    texts = [document.text for document in StdlibConfig().build().documents()]
    documents = split_documents(subject, texts, trained.data.length, 5_000_000, 0.05)
    ranks = default_ranks(min(subject.vocab_size, subject.width))
    gaps = rank_sweep(subject, documents, ranks, Training(), trained.cell.directory / "sweep").gaps
    return {"sweep gap": Series(axes={"rank": tuple(gaps)}, values=tuple(gaps.values()))}


def floors(arms: Sequence[Arm], settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Table → rank → the least excess that logits of the narrow and of the wide rank can have on it, by a direct fit."""
    names = {"narrow": "free", "mixture.narrow": "mixture"}
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        if arm.name in names:
            data = load_recipe(arm.settings["recipe"]).data.build(None)
            matrix = NgramMatrix(torch.from_numpy(data.log_table_vv).exp(), torch.from_numpy(data.stationary_v))
            gaps = {str(rank): fitted_gap(matrix, rank) for rank in (settings["narrow"], settings["wide"])}
            found[names[arm.name]] = gaps
    return found


def tables(cells: Cells) -> tuple[Table, ...]:
    """Means over samples of the rank curves, and means over seeds of the trained models beside the floors."""
    found: dict[str, list[tuple[Cell, Measurement]]] = {}
    for cell, measurement in cells:
        found.setdefault(cell.arm.name, []).append((cell, measurement))
    ranks: list[Row] = []
    trained: list[Row] = []
    for name, rows in found.items():
        metrics = [measurement.metrics for _, measurement in rows]
        if not is_text(rows[0][0].arm):
            if "excess" in metrics[0]:
                trained.append((name, *(_mean(metrics, key) for key in ("excess", "rise", "anisotropy"))))
            continue
        series = [measurement.series["fitted gap"] for _, measurement in rows]
        for index, rank in enumerate(series[0].axes["rank"]):
            fitted = sum(one.values[index] or 0.0 for one in series) / len(series)
            cut, tail = (sum(m.extra[key][index] for _, m in rows) / len(rows) for key in ("truncated", "tail"))
            ranks.append((name, int(rank), fitted, cut, tail))
    least: dict[str, dict[str, float]] = cells[0][0].prepared["floors"]
    bounds = tuple((table, int(rank), gap) for table, by_rank in least.items() for rank, gap in by_rank.items())
    return (
        Table(title="Data rank of source code", columns=("tokens", "rank", "fitted gap", "truncation gap", "tail"),
              rows=tuple(ranks), note="Nats per token, means over disjoint samples; the tail is relative. " + CAPPED),
        Table(title="Trained on random tables", columns=("arm", "excess", "rise", "anisotropy"), rows=tuple(trained),
              note="Excess in nats per token over the table's entropy; rise: final validation loss above its best."),
        Table(title="Least excess of any logits of a rank", columns=("table", "rank", "excess"), rows=bounds,
              note="Logits fitted to the table itself: no linear head of this rank can be better, up to the fit."),
    )  # fmt: skip


def _mean(metrics: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in metrics) / len(metrics)


def figures(cells: Cells) -> tuple[Figure, ...]:
    """Gap against rank, mean and range over samples: of n-gram tables, and of a frozen model's heads where one was swept."""
    found: dict[str, list[Series]] = {}
    for cell, measurement in cells:
        for name in ("fitted gap", "sweep gap"):
            if name in measurement.series:
                found.setdefault(cell.arm.name, []).append(measurement.series[name])
    lines = []
    for name, series in found.items():
        columns = list(zip(*(one.values for one in series), strict=True))
        values = [[max(value or 0.0, 1e-6) for value in column] for column in columns]
        mean = tuple(sum(column) / len(column) for column in values)
        low, high = tuple(map(min, values)), tuple(map(max, values))
        lines.append(Line(name=name, x=series[0].axes["rank"], y=mean, low=low, high=high))
    figure = Figure(title="Cross-entropy beyond full rank", x_label="rank", y_label="nats per token",
                    log_x=True, log_y=True, lines=tuple(lines), note="mean and range over disjoint samples")  # fmt: skip
    return (figure,) if lines else ()


def beside(cells: Cells) -> tuple[PaperFigure, ...]:
    """The paper's numbers with ours."""

    def mean(arm: str, metric: str) -> str:
        values = [m.metrics[metric] for cell, m in cells if cell.arm.name == arm and metric in m.metrics]
        return f"{sum(values) / len(values):.3g}" if values else "–"

    return (
        PaperFigure(
            setting="rank of n-gram next-token matrices", paper="error still large at 1000, about 10 000 needed (web text)",
            ours=f"critical rank {mean('bytes', 'critical_rank')} (bytes), {mean('bpe', 'critical_rank')} (1024 tokens)",
            note="frequent contexts of source code, against the counts themselves",
        ),
        PaperFigure(setting="critical rank of output heads", paper="about 1000 (1B to 7B models)", note="needs the gpu scale"),
        PaperFigure(
            setting="last-layer anisotropy of small models late in training", paper="jumps as the loss saturates",
            ours=f"{mean('narrow', 'anisotropy')} (narrow), {mean('wide', 'anisotropy')} (wide)",
            note=f"narrow: loss ends {mean('narrow', 'rise')} above its best; saturation is not expected at this scale",
        ),
        PaperFigure(setting="final loss of models below 410M above the law of larger ones", paper="8 %", note="not measured"),
    )  # fmt: skip
