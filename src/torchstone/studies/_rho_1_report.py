"""Tables and figures of the Rho-1 study, and published numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.evals.trajectories import CATEGORIES, MEANING
from torchstone.lab.study import Cell, Measurement
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Table

Cells = Sequence[tuple[Cell, Measurement]]

METRICS = (
    Metric(name="clean_loss", label="loss on clean text", unit="nats/token"),
    Metric(name="clean_top1", label="top-1 on clean text", better="higher"),
    Metric(name="noise_selected", label="share of noise among trained targets"),
)
PAPER = (
    PaperFigure(setting="TinyLlama 1.1B, OpenWebMath: GSM8K / MATH", paper="CLM on 15B tokens 6.4 / 2.4; Rho-1, 9B of them "
                "selected, 29.8 / 14.0", ours="not run"),
    PaperFigure(setting="Mistral 7B, the same", paper="CLM 42.9 / 22.2; Rho-1, 10.5B selected, 66.9 / 31.0", ours="not run"),
    PaperFigure(setting="share of tokens by trajectory: H>L / L>L / H>H / L>H", paper="26 / 51 / 11 / 12 %",
                ours="see the table of categories"),
)  # fmt: skip
STARTS = (
    "All arms of a seed start from the same weights. Those that train on the noisy data alone see the same rows in the same "
    "order; `clm-equal`, `clm-longer` and `long.*` go on with further ones, `clm-clean` has clean rows in the place of some, and "
    "`clean.*` trains on text without noise."
)
LANGUAGES = (
    "Each seed has a language (a table) of its own, so that intervals cover languages; the reference follows from the "
    "seed."
)
ONE_TEXT = (
    "Corpus, tokenizer and references are one for all seeds, so that intervals cover initial weights and the order of rows "
    "alone."
)
COST = (
    "FLOPs are three forward passes per training target, and for arms with a reference one more of the reference per target "
    "(as if scored while training) and all of its own training. `clm-equal` spends all of that on steps, `clm-longer` the "
    "scoring alone, `clm-clean` the reference's data and training."
)
COUNTED = "Targets that are not selected count as trained on: their hidden states are computed."
SETTING = (
    "Width, rate and the reference's steps were chosen by pilots that saw SLM − CLM; at the four other settings tried it lay "
    "between −0.02 and +0.03. Verdicts are of this setting, and `rate.*` is another."
)


def by_arm(cells: Cells) -> dict[str, list[Measurement]]:
    """Arm → measurements of its seeds."""
    found: dict[str, list[Measurement]] = {}
    for cell, measurement in cells:
        found.setdefault(cell.arm.name, []).append(measurement)
    return found


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def arms_table(cells: Cells) -> Table:
    """Metrics and cost of every arm, means over seeds."""
    rows: list[tuple[str | float | int | None, ...]] = []
    for arm, found in by_arm(cells).items():
        metrics = [mean([one.metrics[metric.name] for one in found]) for metric in METRICS]
        own, reference = (mean([one.extra["cost"][name] for one in found]) for name in ("own", "reference"))
        rows.append((arm, *metrics, found[0].tokens, own, reference))
    columns = ("arm", *(metric.label for metric in METRICS), "targets", "training FLOPs", "FLOPs of the reference")
    return Table(title="All arms", columns=columns, rows=tuple(rows), note="means over seeds")


def categories_table(cells: Cells) -> Table:
    """How tokens are shared among the four categories; in the language with known noise, how much of each is noise as well."""
    kinds = ["share"] if on_text(cells) else ["share", "noise"]
    rows: list[tuple[str | float | int | None, ...]] = []
    for arm, found in by_arm(cells).items():
        rows.append((arm, *(_category_mean(found, kind, name) for kind in kinds for name in CATEGORIES)))
    columns = ("arm", *(f"{name} {MEANING[name]}" for name in CATEGORIES))
    columns += tuple(f"noise in {name}" for name in CATEGORIES) if "noise" in kinds else ()
    watched = (
        "tokens of held-out text, which is clean"
        if on_text(cells)
        else "tokens of noisy sequences that no arm trains on"
    )
    note = f"{watched}, up to 10 checkpoints; means over seeds"
    return Table(title="Trajectories of tokens", columns=columns, rows=tuple(rows), note=note)


def _category_mean(found: Sequence[Measurement], kind: str, name: str) -> float | None:
    """Mean over seeds of a category's share, or of the noise in it over the seeds where it has tokens; None: nowhere."""
    values = [one.extra["categories"][kind][name] for one in found]
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def on_text(cells: Cells) -> bool:
    """Whether these are cells of a text scale."""
    return any("recipe" in cell.settings for cell, _ in cells)


def notes(cells: Cells) -> tuple[str, ...]:
    """Small print of a scale."""
    if on_text(cells):
        return STARTS, ONE_TEXT, COST, COUNTED
    return STARTS, LANGUAGES, COST, COUNTED, SETTING


def facts_table(cells: Cells) -> Table:
    """The facts that the design asks for, as contrasts of means: what is gained, by what, and at which price."""
    arms = by_arm(cells)
    rows: list[tuple[str | float | int | None, ...]] = []
    for what, metric, arm, baseline in FACTS:
        if arm in arms and baseline in arms:
            values = [mean([one.metrics[metric] for one in arms[name]]) for name in (arm, baseline)]
            rows.append((what, metric, f"{arm} − {baseline}", values[0] - values[1]))
    return Table(
        title="What selection gains, and why", columns=("what", "metric", "contrast", "difference"), rows=tuple(rows)
    )


FACTS = (
    ("selection against all tokens, equal FLOPs", "clean_loss", "slm", "clm-equal"),
    ("selection against all tokens, equal steps", "clean_loss", "slm", "clm"),
    ("noise removal alone (the reference's loss decides)", "clean_loss", "reference", "clm"),
    ("what excess loss adds to it", "clean_loss", "slm", "reference"),
    ("hard tokens", "clean_loss", "hard", "clm"),
    ("top-1 beside the loss", "clean_top1", "slm", "clm"),
    ("selection after three times the steps", "clean_loss", "long.slm", "long.clm"),
    ("selection at five times the learning rate", "clean_loss", "rate.slm", "rate.clm"),
    ("selection where there is no noise", "clean_loss", "clean.slm", "clean.clm"),
)


def curves(cells: Cells) -> Figure:
    """Clean loss during training, mean and range over seeds."""
    lines = []
    for arm, found in by_arm(cells).items():
        series = [one.series["clean loss"] for one in found]
        columns = list(zip(*(one.values for one in series), strict=True))
        lines.append(
            Line(name=arm, x=series[0].axes["steps"], y=tuple(map(mean, columns)), low=tuple(map(min, columns)),
                 high=tuple(map(max, columns)))
        )  # fmt: skip
    return Figure(title="Loss on clean text", x_label="step", y_label="nats per token", lines=tuple(lines),
                  note="mean and range over seeds")  # fmt: skip
