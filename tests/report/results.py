"""Builders of results that look like real ones: curves that fall, seeds that differ, cells that fail."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from torchstone.report.result import (
    ArmRecord,
    CellRecord,
    Change,
    Figure,
    Interval,
    Line,
    Match,
    Metric,
    Pair,
    PaperFigure,
    Result,
    Series,
    Table,
    Verdict,
)

HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "</svg><img src=x onerror=window.hacked=1>",
    "javascript:window.hacked=1",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "abc\u202egnp.exe\u200f\u2066",
    "=cmd()|' /C calc'!A0",
    '"><svg onload=window.hacked=1>',
    "]]><!--<style>body{display:none}</style>",
    "a|b\n\n# heading [link](javascript:alert(1)) `code`",
    "{{7*7}} ${7*7} $title",
    "line\u2028separator\u2029",
)

METRICS = (
    Metric(name="validation_loss", label="validation loss", unit="nats", better="lower"),
    Metric(name="recall", label="key retrieval accuracy", unit="", better="higher"),
    Metric(name="seconds", label="time to finish", unit="s", better="lower"),
)
RECIPE = """\
model:
  kind: decoder
  width: 128
  depth: 4
  head_dim: 16
  block:
    mixer: {kind: attention, qk_norm: false}
    feedforward: {kind: swiglu, hidden: null}
budget: {tokens: 500000}
optimizer: {kind: adamw, learning_rate: 3e-3}
"""


def series(arm: int, seed: int, points: int, final: float) -> Series:
    """A falling loss with noise; later points are calmer."""
    draw = random.Random(f"{arm}/{seed}")
    steps = [round(1 + index * 2000 / max(1, points - 1)) for index in range(points)]
    steps = list(dict.fromkeys(steps))
    values = [final + 4.2 * math.exp(-3 * (s / 500) ** 0.55) + draw.gauss(0, 0.02) for s in steps]
    speed = (1.0 + 0.25 * arm) * draw.uniform(0.97, 1.03)
    axes = {
        "steps": tuple(float(s) for s in steps),
        "tokens": tuple(256.0 * s for s in steps),
        "flops": tuple(256.0 * s * 6.1e6 * (1 + 0.001 * arm) for s in steps),
        "seconds": tuple(0.045 * s * speed for s in steps),
    }
    return Series(axes=axes, values=tuple(values))


def arm_record(name: str, index: int, **changes: Any) -> ArmRecord:
    """An arm; the first one is the baseline."""
    if index == 0:
        return ArmRecord(
            name=name,
            role="baseline",
            note="Plain softmax attention with rotary positions.",
            parameters=1_213_440,
            flops_per_token=6.1e6,
            learning_rate=3e-3,
            learning_rate_policy="tuned",
        )
    given: dict[str, Any] = {
        "name": name,
        "role": "arm",
        "parameters": 1_213_440 + 800 * index,
        "flops_per_token": 6.1e6 * (1 + 0.002 * index),
        "learning_rate": 2e-3,
        "learning_rate_policy": "tuned",
        "intervention": (
            Change(path="model.block.mixer.kind", baseline="attention", value="differential"),
            Change(path="model.block.mixer.version", value="v2"),
            Change(path="optimizer.betas", baseline=[0.9, 0.95], value=[0.9, 0.98]),
        ),
        "match": Match(
            on="params",
            free="model.block.feedforward.hidden",
            before=344,
            after=336,
            target=1_213_440,
            achieved=1_213_440 + 800 * index,
            residual=800 * index / 1_213_440,
            tolerance=0.005,
        ),
    }
    return ArmRecord(**{**given, **changes})


def cell(arm: str, index: int, seed: int, points: int = 300, curves: bool = True) -> CellRecord:
    """A finished cell."""
    draw = random.Random(f"metric/{arm}/{seed}")
    final = 2.31 - 0.042 * index + 0.03 * math.sin(seed) + draw.gauss(0, 0.006)
    found = {}
    if curves:
        train = series(index, seed, points, final)
        every = max(1, points // 20)
        sparse = Series(
            axes={key: values[::every] for key, values in train.axes.items()},
            values=tuple(value + 0.06 for value in train.values[::every] if value is not None),
        )
        found = {"train_loss": train, "validation_loss": sparse}
    return CellRecord(
        arm=arm,
        seed=seed,
        status="done",
        fingerprint=f"{draw.getrandbits(128):032x}",
        series=found,
        metrics={
            "validation_loss": final + 0.06,
            "recall": 0.71 + 0.03 * index + draw.gauss(0, 0.01),
            "seconds": 92.0 + 20 * index + draw.gauss(0, 1),
        },
        seconds=92.0 + 20 * index + draw.gauss(0, 1),
        tokens=512_000,
        flops=512_000 * 6.1e6 * (1 + 0.002 * index),
        peak_bytes=(410 + 30 * index) * 2**20,
    )


def verdict(claim: str, arm: str, baseline: str, cells: tuple[CellRecord, ...], **changes: Any) -> Verdict:
    """A verdict over the cells that both arms finished."""
    metric = changes.get("metric", "validation_loss")
    by_key = {(c.arm, c.seed): c.metrics[metric] for c in cells if c.status == "done"}
    seeds = sorted({c.seed for c in cells})
    log = changes.get("contrast") == "log ratio"
    pairs = []
    for seed in seeds:
        if (arm, seed) in by_key and (baseline, seed) in by_key:
            a, b = by_key[arm, seed], by_key[baseline, seed]
            pairs.append(Pair(unit=str(seed), baseline=b, arm=a, contrast=math.log(a / b) if log else a - b))
    effect = sum(p.contrast for p in pairs) / len(pairs)
    spread = math.sqrt(sum((p.contrast - effect) ** 2 for p in pairs) / max(1, len(pairs) - 1))
    half = 4.3 * spread / math.sqrt(len(pairs)) + 1e-4
    given: dict[str, Any] = {
        "claim": claim,
        "sentence": "Differential attention reaches a lower validation loss at equal parameters.",
        "metric": metric,
        "arm": arm,
        "baseline": baseline,
        "contrast": "difference",
        "direction": "less",
        "margin": -0.01,
        "status": "holds",
        "effect": effect,
        "interval": Interval(low=effect - half, high=effect + half, level=0.95),
        "n": len(pairs),
        "mde_before": 0.02,
        "mde_after": 2.1 * half,
        "pairs": tuple(pairs),
        "reason": "The whole interval lies below the margin.",
    }
    return Verdict(**{**given, **changes})


def study(arms: int = 3, seeds: int = 3, points: int = 300, curves: bool = True, failed: bool = True) -> Result:
    """A realistic study: a verdict of every kind, sequential looks, a failed cell, tables, figures, paper
    numbers."""
    names = ["attention", "differential", "differential-v2", *(f"arm-{index}" for index in range(3, arms))][:arms]
    cells = [cell(name, index, seed, points, curves) for index, name in enumerate(names) for seed in range(seeds)]
    if failed and arms > 2 and seeds > 1:
        cells[-1] = CellRecord(
            arm=names[-1],
            seed=seeds - 1,
            status="failed",
            seconds=3.1,
            error='Traceback (most recent call last):\n  File "train/loop.py", line 212, in step\n'
            "    raise NonFiniteError(message)\ntorchstone.errors.NonFiniteError: loss is nan at step 41 "
            "(seed 2, layer03/mixer has the first non-finite gradient); the crash bundle is in "
            "crash/step-00000041.",
        )
    every = tuple(cells)
    return Result(
        title="Differential Transformer",
        slug="differential-transformer",
        scale="toy",
        baseline=names[0],
        question="Does subtracting two softmax maps lower the loss of a small language model at equal parameters?",
        design="Contrasts are paired by seed: same data order, same initialisation where shapes "
        "agree. Intervals are "
        "two-sided 95 % t intervals. Seeds may be added at 3, 5 and 8 under an O'Brien-Fleming rule.",
        fingerprint="9f1c3a7be02d4466a1f0c9d8e7b6a5f4",
        created="2024-11-20T14:03:22Z",
        command="torchstone study run differential-transformer --scale toy --seeds 3",
        metrics=METRICS,
        arms=tuple(arm_record(name, index) for index, name in enumerate(names)),
        cells=every,
        verdicts=_verdicts(names, every),
        tables=_tables(names),
        figures=_figures(),
        paper=_paper(),
        notes=(
            "The corpus is the standard library's source, not web text.",
            "Both arms use the learning rate that did best for them among 5.",
        ),
        environment={"torch": "2.13.0+cpu", "python": "3.11.7", "machine": "x86_64, 2 cores", "threads": "1"},
        recipe_yaml=RECIPE,
    )


def _verdicts(names: list[str], cells: tuple[CellRecord, ...]) -> tuple[Verdict, ...]:
    if len(names) < 2:
        return ()
    looks = (
        {"n": 3, "effect": -0.031, "z": -1.9, "boundary": 4.05, "stopped": False},
        {"n": 5, "effect": -0.039, "z": -2.7, "boundary": 2.86, "stopped": False},
        {"n": 8, "effect": -0.041, "z": -4.4, "boundary": 2.02, "stopped": True},
    )
    found = [verdict("lower-loss", names[1], names[0], cells, looks=looks)]
    if len(names) > 2:
        found += [
            verdict(
                "v2-lower-loss",
                names[2],
                names[0],
                cells,
                status="inconclusive",
                margin=-0.08,
                n_needed=11,
                sentence="The second version gains at least twice as much.",
                mde_before=None,
                reason="The margin lies inside the interval.",
            ),
            verdict(
                "no-slower",
                names[2],
                names[0],
                cells,
                metric="seconds",
                contrast="log ratio",
                direction="less",
                margin=math.log(1.1),
                status="fails",
                sentence="Training takes at most 10 % longer than attention.",
                reason="The whole interval lies above the margin.",
                mde_before=0.05,
                mde_after=0.02,
            ),
        ]
    return tuple(found)


def _tables(names: list[str]) -> tuple[Table, ...]:
    rows = tuple(
        (name, index, 0.3123456 + index / 7, None if index == 1 else 12345.678) for index, name in enumerate(names)
    )
    return (
        Table(
            title="Attention noise by layer",
            columns=("arm", "layer", "share on noise", "tokens"),
            rows=rows,
            note="Share of attention that falls on tokens other than the answer.",
        ),
    )


def _figures() -> tuple[Figure, ...]:
    x = tuple(float(2**power) for power in range(11))
    rise = tuple(1 - math.exp(-value / 90) for value in x)
    return (
        Figure(
            title="Retrieval against context length",
            x_label="context (tokens)",
            y_label="accuracy",
            log_x=True,
            lines=(
                Line(
                    name="differential",
                    x=x,
                    y=rise,
                    low=tuple(v * 0.9 for v in rise),
                    high=tuple(v * 1.05 for v in rise),
                ),
                Line(name="attention", x=x, y=tuple(v * 0.8 for v in rise)),
                Line(name="shuffled labels", x=x, y=tuple(0.1 if i % 4 else None for i in range(11))),
            ),
            note="Bands are 95 % bootstrap intervals over 200 items.",
        ),
    )


def _paper() -> tuple[PaperFigure, ...]:
    return (
        PaperFigure(
            setting="3B parameters, 1T tokens, average of 7 tasks",
            paper="60.6 against 57.5",
            ours="",
            note="not measured at this scale",
        ),
        PaperFigure(
            setting="parameters needed for equal loss",
            paper="65 %",
            ours="71 %",
            note="extrapolated from 3 sizes",
        ),
    )


def comparison() -> Result:
    """The least that a result can be: one arm, nothing measured."""
    return Result(
        title="Nothing yet",
        fingerprint="00",
        created="2024-11-20",
        baseline="only",
        metrics=(),
        arms=(ArmRecord(name="only", role="baseline"),),
    )


def algorithm() -> Result:
    """A study without training: no curves, verdict over items, log ratios that are factors."""
    return Result(
        title="Compute allocation for sampling",
        slug="osca",
        scale="toy",
        baseline="uniform",
        fingerprint="c0ffee" * 5,
        question="Does an allocation learned on a training split solve more problems for the same number of samples?",
        created="2024-11-20T09:00:00Z",
        metrics=(
            Metric(name="samples", label="samples needed", better="lower"),
            Metric(name="solved", label="problems solved", unit="%", better="higher"),
        ),
        arms=(
            ArmRecord(name="uniform", role="baseline"),
            ArmRecord(name="learned", note="Hill climbing on the training split."),
            ArmRecord(name="oracle", role="control", note="Knows the success rates."),
        ),
        cells=tuple(
            CellRecord(arm=arm, seed=seed, status="done", metrics={"samples": 100.0 + seed, "solved": 61.0 + seed})
            for arm in ("uniform", "learned", "oracle")
            for seed in range(2)
        ),
        verdicts=_algorithm_verdicts(),
    )


def _algorithm_verdicts() -> tuple[Verdict, ...]:
    pairs = tuple(
        Pair(unit=f"problem-{index:03d}", baseline=1.0, arm=2.0, contrast=0.6 + 0.4 * math.sin(index))
        for index in range(240)
    )
    return (
        Verdict(
            claim="more-work",
            sentence="The learned allocation needs at least 1.5 times fewer samples.",
            metric="samples",
            arm="learned",
            baseline="uniform",
            contrast="log ratio",
            direction="greater",
            margin=math.log(1.5),
            status="inconclusive",
            effect=0.6,
            interval=Interval(low=0.38, high=0.82, level=0.95),
            n=240,
            unit_of_n="items",
            n_needed=700,
            pairs=pairs,
            reason="The margin lies inside the interval.",
        ),
        Verdict(
            claim="oracle",
            sentence="The oracle solves more problems.",
            metric="solved",
            arm="oracle",
            baseline="uniform",
            contrast="difference",
            direction="greater",
            margin=0.0,
            status="inconclusive",
            n=0,
            reason="A cell failed, so there is nothing to compare.",
        ),
    )


def _hostile_verdicts(verdicts: list[dict], names: dict[str, str], text: Callable[[int], str]) -> None:
    for index, entry in enumerate(verdicts):
        entry.update(
            claim=text(index),
            sentence=text(index + 1),
            arm=names[entry["arm"]],
            baseline=names[entry["baseline"]],
            reason=text(index + 2),
            unit_of_n=text(index + 3),
            looks=[{text(0): text(1), text(2): 3.0}],
        )
        for number, pair in enumerate(entry["pairs"]):
            pair["unit"] = text(number)


def hostile() -> Result:
    """Every string that a user or a model can choose is one of `HOSTILE`."""
    texts = list(HOSTILE)

    def text(index: int) -> str:
        return texts[index % len(texts)]

    base = study(arms=3, seeds=2, points=20)
    names = {arm.name: text(index) for index, arm in enumerate(base.arms)}
    data = base.model_dump(mode="json")
    for index, arm in enumerate(data["arms"]):
        arm["name"], arm["note"] = names[arm["name"]], text(index + 3)
        for number, change in enumerate(arm["intervention"]):
            change.update(
                path=text(number),
                baseline=text(number + 4),
                value={"key" + text(number + 5): text(number + 6)},
            )
    for index, entry in enumerate(data["cells"]):
        entry.update(arm=names[entry["arm"]], error=text(index) + "\n" + text(index + 1), fingerprint=text(index + 2))
        entry["status"] = "failed" if index == 0 else entry["status"]
        entry["series"] = {text(position): one for position, one in enumerate(entry["series"].values())}
        for one in entry["series"].values():
            one["axes"][text(7)] = one["axes"].pop("seconds")
        entry["metrics"] = {text(0): 1.0, "validation_loss": 2.0}
    _hostile_verdicts(data["verdicts"], names, text)
    data["metrics"][0].update(label=text(0), unit=text(1))
    data["metrics"].append({"name": text(0), "label": text(9), "unit": text(8), "better": "lower"})
    data["tables"] = [
        {
            "title": text(i),
            "columns": [text(i), "n"],
            "rows": [[one, 1.0] for one in texts],
            "note": text(i + 1),
        }
        for i in range(2)
    ]
    data["figures"][0].update(title=text(1), x_label=text(2), y_label=text(0), note=text(3))
    for index, line in enumerate(data["figures"][0]["lines"]):
        line["name"] = text(index + 1)
    data["paper"] = [{"setting": one, "paper": one, "ours": one, "note": one} for one in texts]
    data.update(
        title=text(0),
        question=text(1),
        slug=text(2),
        scale=text(3),
        design=text(4),
        fingerprint=text(7),
        command=text(6),
        created=text(5),
        notes=texts,
        environment={one: one for one in texts},
        recipe_yaml="\n".join(texts),
        baseline=names[data["baseline"]],
    )
    return Result.model_validate(data)


BUILDERS = {
    "study": study,
    "many-arms": lambda: study(arms=9, seeds=3),
    "many-cells": lambda: study(arms=8, seeds=40, points=500, failed=False),
    "algorithm": algorithm,
    "nothing": comparison,
    "one-arm": lambda: study(arms=1, seeds=2),
    "hostile": hostile,
}
