"""Does the rank of the output head limit the loss, and how much rank does the data have?

Godey, de la Clergerie, Sagot, "Why do small language models underperform?", arXiv 2404.07647. Two experiments.

Data rank. How many dimensions the next-token distributions of frequent contexts of source code need: bytes (three bytes of
context) against byte pairs with 1024 ids (one token of context, about as long). Control: counts with the same totals drawn
whatever the context; their true rank is 1, and what rank they need is noise. A seed is one of four disjoint samples of documents.

Causal toy, which the paper does not have. One-layer models learn random bigram tables of known entropy at equal
parameters: a narrow body with a linear head; the same with a mixture of softmaxes; a wide body whose head is held to the narrow
one's rank; and the wide body with its own. If rank is the cause, the second and fourth lose less than the first and third. Rows
of the `free` table are independent, so that small models lack parameters as well as rank; on a table made by a mixture of
softmaxes over few channels only rank is missing: the control that must hold if anything does. "Removed" means at least halved,
but for rank on the free table a tenth: there, logits of the wide rank cannot lose less than two thirds of what the narrow rank's
must. Beside the arms stands that least excess. Saturation is not expected at this scale; the rise is reported.

Chosen before any arm was trained, by the least excess: the mixture table's scale and channels. Chosen after a look: the learning
rate, on the narrow arm and seed 1000; ranks and contexts of n-gram tables, on the fourth sample, which the toy scale leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchstone.lab.study import Arm, Cell, Claim, Measurement, Resources, Scale, Summary
from torchstone.lab.training import Matching, Probe, Trained, TrainingStudy, Variant
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.report.result import ArmRecord
from torchstone.studies import _softmax_bottleneck as parts

HALF = math.log(0.5)
EXPRESSIVE = "At the narrow width, a mixture of softmaxes at least halves the excess of a linear head"
RANK = "the excess of a head held to the narrow rank"
TOY = {"wide": 48, "narrow": 16, "hidden": 1000, "vocab": 512, "steps": 1000, "batch": 8, "evaluate": 64, "rate": 1e-2,
       "megabytes": 2.0, "byte_contexts": 800, "byte_ranks": [2, 4, 8, 16, 32, 64],
       "bpe_contexts": 400, "bpe_ranks": [16, 64, 128, 256], "text_steps": 0}  # fmt: skip


class SoftmaxBottleneck(TrainingStudy):
    """Rank curves of source code, and random tables learnt with heads of different rank."""

    slug = "softmax-bottleneck"
    title = "Softmax bottleneck"
    question = "Does the rank of the output head limit the loss at equal parameters, and how much rank does text have?"
    baseline = "narrow"
    matching = Matching("params")
    metrics = parts.METRICS
    claims = (
        Claim("data-rank", "Source code in 1024 tokens needs a larger rank than in bytes.", "critical_rank",
              "bpe", "bytes", "log ratio", "greater"),
        Claim("data-rank-noise", "At rank 16, bytes lose more than counts without structure.", "gap_16",
              "bytes", "bytes-noise", "log ratio", "greater"),
        Claim("data-rank-noise-bpe", "At rank 16, tokens lose more than counts without structure.", "gap_16",
              "bpe", "bpe-noise", "log ratio", "greater"),
        Claim("free-expressive", EXPRESSIVE + " (free table).", "excess",
              "narrow-mixture", "narrow", "log ratio", "less", HALF),
        Claim("free-rank", f"In the wide body, the full head removes a tenth of {RANK} (free table).", "excess",
              "wide", "wide-rank", "log ratio", "less", math.log(0.9)),
        Claim("expressive", EXPRESSIVE + " (mixture table).", "excess",
              "mixture.narrow-mixture", "mixture.narrow", "log ratio", "less", HALF),
        Claim("rank", f"In the wide body, the full head at least halves {RANK} (mixture table).", "excess",
              "mixture.wide", "mixture.wide-rank", "log ratio", "less", HALF),
    )  # fmt: skip
    scales = {
        "smoke": Scale(2, {**TOY, "wide": 32, "narrow": 8, "hidden": 512, "vocab": 64, "steps": 4, "evaluate": 8,
                           "megabytes": 0.05, "byte_contexts": 40, "bpe_contexts": 40,
                           "byte_ranks": [4, 16], "bpe_ranks": [4, 16]}),
        "toy": Scale(3, TOY),
        "gpu": Scale(4, {**TOY, "steps": 4000, "batch": 32, "rate": 5e-3, "text_steps": 1500}),
    }  # fmt: skip

    def base(self, scale: Scale) -> Recipe:
        """A narrow one-layer model with a linear head on the free table."""
        s = scale.settings
        return load_recipe({
            "model": {
                "kind": "decoder", "width": s["narrow"], "depth": 1, "head_dim": 8,
                "block": {"feedforward": {"kind": "swiglu", "hidden": s["hidden"]}},
                "head": {"kind": "linear", "tied": False},
                "initialisation": {"kind": "normal", "std": 0.1, "embedding_std": 0.5, "scale_residual": False},
            },
            "data": {"kind": "bigram", "vocab_size": s["vocab"], "length": 64},
            "optimizer": {"kind": "adamw", "learning_rate": s["rate"], "weight_decay": 0.0},
            "schedule": {"kind": "linear"},
            "budget": {"steps": s["steps"]},
            "batch": {"sequences": s["batch"]},
            "evaluation": {"every": max(1, s["steps"] // 12), "sequences": s["evaluate"]},
        })  # fmt: skip

    def variants(self, scale: Scale) -> Sequence[Variant]:
        """Both tables with the same four arms; text with a full and a narrow head where there is a GPU."""
        s = scale.settings
        mixture = "model.head={kind: mixture-of-softmaxes, components: 4, tied: false}"
        wide, held = f"model.width={s['wide']}", f"model.head={{kind: factored, rank: {s['narrow']}}}"
        table = ("data.latent=8", "data.components=4", "data.scale=3.0")
        bound, own = "wide, its head held to the narrow rank", "wide, linear head"
        arms = [
            Variant("narrow", role="baseline"),
            Variant("narrow-mixture", (mixture,), note="four softmaxes"),
            Variant("wide-rank", (wide, held), "control", bound),
            Variant("wide", (wide,), "control", own),
            Variant("mixture.narrow", table, "control", "the baseline on a mixture table", matched=False),
            Variant("mixture.narrow-mixture", (mixture,), note="four softmaxes", against="mixture.narrow"),
            Variant("mixture.wide-rank", (wide, held), "control", bound, against="mixture.narrow"),
            Variant("mixture.wide", (wide,), "control", own, against="mixture.narrow"),
        ]
        if s["text_steps"]:
            full = (*parts.TEXT, f"budget.steps={s['text_steps']}")
            arms += [Variant("text.full", full, "control", "text, full rank", matched=False),
                     Variant("text.rank-64", (parts.RANK_64,), "control", "text, rank 64", against="text.full")]  # fmt: skip
        return arms

    def arms(self, scale: Scale) -> list[Arm]:
        """Trained arms, then those that count n-grams."""
        return [*super().arms(scale), *parts.text_arms(scale.settings)]

    def arm_record(self, arm: Arm) -> ArmRecord:
        """Arms that train nothing have neither size nor cost."""
        return ArmRecord(name=arm.name, role=arm.role, note=arm.note) if parts.is_text(arm) else super().arm_record(arm)

    def resources(self, arms: Sequence[Arm]) -> Resources:
        """As the trained arms need."""
        return super().resources([arm for arm in arms if not parts.is_text(arm)])

    def prepare(self, arms: Sequence[Arm], settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """Data and tokenizer once, and the least excess of either table at both ranks."""
        trained = [arm for arm in arms if not parts.is_text(arm)]
        parts.tokenizer_of()
        return super().prepare(trained, settings, directory) | {"floors": parts.floors(trained, settings)}

    def measure(self, cell: Cell) -> Measurement:
        """Count n-grams, or train."""
        return parts.measure_text(cell) if parts.is_text(cell.arm) else super().measure(cell)

    def probe(self, trained: Trained) -> Probe:
        """Exact excess over the table's entropy; for text of full rank, a sweep of the frozen model's head."""
        if trained.recipe.data.kind == "bigram":
            return Probe(parts.excess_of(trained))
        return Probe(series=parts.sweep_of(trained) if trained.recipe.model.head.kind == "linear" else {})

    def summarise(self, cells: Sequence[tuple[Cell, Measurement]]) -> Summary:
        """Rank curves, excess beside its lower bounds, and the paper's numbers beside ours."""
        note = "Saturation, a loss that rises late in training, is not expected at this scale."
        return Summary(
            tables=parts.tables(cells), figures=parts.figures(cells), paper=parts.beside(cells), notes=(note,)
        )
