"""Study B of JetMoE: does a small target text help more in the decay of the rate than spread over the run?

Two texts as bytes with shared token ids: broad is Python's standard library (source code, about 10 MB), target Python's help
topics (English technical prose, 0.4 MB, each passage once), which the broad text leaves out. In every arm the target has exactly
5 % of all rows, counted in every cell:

    phases.uniform   wsd, 5 % target in every batch
    phases.decay     wsd, no target in warmup and stable stage, 25 % in the decay, which is the last fifth of the run
    phases.cosine    cosine, 5 % target in every batch (control: what the usual schedule gives without phases)

Metrics are losses at the end on held-out text of each source by itself, the same windows for all arms and seeds. Fixed before
any run: the target claims have the margin 0, so that they hold where the 95 % interval of the paired differences lies below
0; the broad claim is that placement costs less than 0.02 nats. All arms share one peak rate, which was not tuned. Steps,
rows and length were chosen for time; in two pilots (seeds 1000 and 1001, at toy size and at a longer one, with another target
text, the change logs of IDLE) losses were seen. That text is not part of every installation, so it was replaced before any run.

Pitfalls: the decay arm sees the target last, and at the lowest rates. What it gains is gain of both together. At gpu scale the
target is read about three times over, in all arms. About 5 % of the held-out target rows of 64 bytes occur in the text twice
(tables, headings); of the broad text's it is 10 %.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from torchstone.errors import StudyError
from torchstone.lab.study import Claim, Scale
from torchstone.lab.training import Trained, Variant
from torchstone.report.result import Metric

SHARES, DECAY_SHARES = (0.95, 0.05), (0.75, 0.25)
BROAD, TARGET = 0, 1
UNIFORM, DECAY, COSINE = "phases.uniform", "phases.decay", "phases.cosine"
COST = 0.02  # nats that placement may cost on broad text

SETTINGS: dict[str, dict[str, int]] = {
    "smoke": {"phases_depth": 1, "phases_steps": 20, "phases_sequences": 20, "phases_length": 16, "phases_windows": 8},
    "toy": {"phases_depth": 2, "phases_steps": 400, "phases_sequences": 20, "phases_length": 64, "phases_windows": 256},
    "gpu": {
        "phases_depth": 8,
        "phases_steps": 1500,
        "phases_sequences": 40,
        "phases_length": 256,
        "phases_windows": 64,
    },
}  # what a scale of the study adds to its settings

METRICS = (
    Metric(name="target_loss", label="loss on held-out target text at the end", unit="nats/byte"),
    Metric(name="broad_loss", label="loss on held-out broad text at the end", unit="nats/byte"),
    Metric(name="target_rows", label="training rows of target text", unit="rows", better="neither"),
)

CLAIMS = (
    Claim("phases-target", "Target text only in the decay gives a lower loss on it than the same rows spread over the run.",
          "target_loss", DECAY, UNIFORM),
    Claim("phases-cosine", "It gives a lower loss on target text than a cosine schedule with the same rows spread over the run.",
          "target_loss", DECAY, COSINE),
    Claim("phases-broad", f"It costs less than {COST} nats on broad text.", "broad_loss", DECAY, UNIFORM, margin=COST),
)  # fmt: skip

NOTES = (
    "Data phases: every arm sees as many rows of target text, in other steps. The texts, and with them the numbers, differ "
    "between versions of Python.",
)


def sources(length: int) -> list[dict[str, Any]]:
    """Broad and target text."""
    text = {"kind": "text", "tokenizer": "bytes", "length": length}
    return [{**text, "corpus": "stdlib"}, {**text, "corpus": "python-help", "validation_fraction": 0.2}]


def variants(scale: Scale) -> list[Variant]:
    """The three arms; the first sets data, length of training and schedule, whatever the study's baseline has there."""
    s = scale.settings
    data = {"kind": "mixture", "sources": sources(s["phases_length"]), "shares": SHARES, "token_ids": "shared"}
    common = (
        f"data={json.dumps(data)}",
        f"model.depth={s['phases_depth']}",
        f"budget.steps={s['phases_steps']}",
        f"batch.sequences={s['phases_sequences']}",
        "evaluation={every: 100, sequences: 40}",
        "schedule={kind: wsd, warmup: 0.05, decay: 0.2, final: 0.1}",
    )
    absent = [1.0, 0.0]
    late = f"data_phases={json.dumps({'warmup': absent, 'stable': absent, 'decay': DECAY_SHARES})}"
    cosine = "schedule={kind: cosine, warmup: 0.05, final: 0.1}"
    return [
        Variant(UNIFORM, common, "control", "two texts, 5 % target in every batch, wsd", matched=False),
        Variant(DECAY, (late,), "arm", "the same rows of target text, all of them in the decay", matched=False, against=UNIFORM),
        Variant(COSINE, (cosine,), "control", "5 % target in every batch, cosine", matched=False, against=UNIFORM),
    ]  # fmt: skip


def target_rows(trained: Trained) -> int:
    """Rows of target text that the run trained on; raises StudyError unless they are 5 % of all."""
    steps, rows = trained.summary.steps, trained.recipe.batch.sequences
    found = trained.data.timetable(rows).before(steps)[TARGET]
    if found != round(SHARES[TARGET] * rows * steps):
        raise StudyError(
            f"{trained.cell.arm.name} had {found} rows of target text in {steps} steps of {rows} rows, not 5 %; choose steps and "
            "rows that divide."
        )
    return found


@torch.no_grad()
def held_out_loss(trained: Trained, source: int) -> float:
    """Nats per byte on held-out text of one source."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, objective = trained.model.to(device), trained.recipe.objective.build()
    total = count = 0.0
    for batch in trained.data.part(source).evaluation(16, trained.cell.settings["phases_windows"]):
        output = objective(model, batch.to(device))
        total, count = total + float(output.loss_sum), count + float(output.count)
    return total / count


def probe(trained: Trained) -> dict[str, float]:
    """The metrics of an arm whose name begins with `phases.`."""
    return {
        "target_loss": held_out_loss(trained, TARGET),
        "broad_loss": held_out_loss(trained, BROAD),
        "target_rows": float(target_rows(trained)),
    }
