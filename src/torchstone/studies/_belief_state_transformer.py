"""Recipes, exact costs, probes and tables of the belief-state study, and the paper's numbers with ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from torchstone.evals.infilling import held_out_gaps, infilling_losses, plain_losses
from torchstone.evals.planning import planning
from torchstone.lab.matching import counts_of, training_flops
from torchstone.lab.study import Cell, Measurement
from torchstone.lab.training import Probe, Trained
from torchstone.models.belief_state import BeliefState
from torchstone.objectives.belief_pairs import pairs_of
from torchstone.objectives.belief_state import BeliefStateObjective
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Budget, Recipe
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table

Cells = Sequence[tuple[Cell, Measurement]]
Settings = Mapping[str, Any]

SOLVED, LEFT = 0.9, 0.1  # solved: share of whole paths; left: so much above guessing
BYTES_END, COUNTED_ROWS = 256, 64
METRICS = (
    Metric(name="path_accuracy", label="whole paths right, decoded greedily", better="higher"),
    Metric(name="first_step", label="first steps right", better="higher"),
    Metric(name="left_plateau", label="step at which paths are 0.1 above guessing", unit="steps"),
    Metric(name="infill_loss", label="loss of the middle given prefix and goal", unit="nats/byte"),
    Metric(name="plain_loss", label="loss of the text without a goal", unit="nats/byte"),
)
NOTES = (
    "Training FLOPs: every encoder on the tokens that it reads, the head on its pairs, three forward passes a step. For star "
    "graphs this is exact. Text has several documents in a row and keeps all pairs at their ends: its arms are matched with the "
    "pairs of 64 real rows, and the FLOPs recorded for infill.belief-state, which know nothing of the text, are lower.",
    "Whether the plateau is left is asked at checkpoints, on the held-out graphs of the final accuracy.",
)


def planning_base(s: Settings) -> Recipe:
    """A decoder on star graphs at the scale's number of steps."""
    width = s["width"]
    feedforward = {"kind": "swiglu", "hidden": max(128, 128 * round(8 * width / 3 / 128))}
    return load_recipe({
        "model": {
            "kind": "decoder", "width": width, "depth": s["depth"], "head_dim": width // s["heads"],
            "block": {"mixer": "attention", "feedforward": feedforward, "norm": {"kind": "rmsnorm", "eps": 1e-5}},
            "head": {"kind": "linear", "tied": False},
            "initialisation": {"kind": "normal", "std": 0.02, "scale_residual": False},
        },
        "data": {"kind": "star-graph", "arms": s["arms"], "path_length": s["path"], "nodes": s["nodes"]},
        "optimizer": {"kind": "adamw", "learning_rate": s["rate"], "weight_decay": 0.0, "clip": 1.0},
        "schedule": {"kind": "constant", "warmup": 0.07}, "budget": {"steps": s["steps"]},
        "batch": {"sequences": s["batch"]}, "evaluation": {"every": None, "sequences": 64},
        "checkpoint": {"every": s["every"], "keep": 10_000}, "compile": False,
    })  # fmt: skip


def belief_state(s: Settings, arm: str) -> tuple[str, ...]:
    """The lines that make the decoder on star graphs an arm with a backward encoder."""
    task = planning_base(s).data
    model = f"model={{kind: belief-state, backward_depth: {s['backward']}, end_token: {task.end_token()}}}"
    if arm == "empty-suffix":
        return (model,)
    weight = 0.0 if arm == "no-prev" else 1.0
    pairs = f"gap_min: 2, context_length: {task.equals_index()}, prev_weight: {weight}"
    return model, f"objective={{kind: belief-state, {pairs}}}"


def text_lines(s: Settings, arm: str) -> tuple[str, ...]:
    """The lines that make the decoder on star graphs an infilling arm: `fim`, `plain` or `belief-state`."""
    t = s["text"]
    order = "goal-first" if arm == "fim" else "as-written"
    text = f"{{kind: text, tokenizer: bytes, length: {t['length']}}}"
    cut = f"piece: {t['piece']}, goal_min: {t['goal_min']}, goal_max: {t['goal_max']}, order: {order}"
    lines = [
        f"data={{kind: fill-in-the-middle, text: {text}, {cut}}}", f"model.depth={t['depth']}", f"budget.steps={t['steps']}",
        f"batch.sequences={t['batch']}", "evaluation.sequences=32", "checkpoint.every=null",
    ]  # fmt: skip
    if arm == "fim":
        lines.append(f"objective={{kind: fill-in-the-middle, fim_token: {BYTES_END + 1}, end_token: {BYTES_END}}}")
    if arm == "belief-state":
        lines.append(f"model={{kind: belief-state, backward_depth: {s['backward']}, end_token: {BYTES_END}}}")
        lines.append(f"objective={{kind: belief-state, pair_rate: {t['rate']}}}")
    return tuple(lines)


def infilling_steps(recipe: Recipe, reference: Recipe) -> int:
    """Steps with which an infilling arm spends the reference's FLOPs, the pairs of real rows counted."""
    length = recipe.data.sequence_length()
    per_step = counts_of(recipe).training_flops_per_token * length * recipe.batch.sequences
    objective = recipe.objective.build()
    if isinstance(objective, BeliefStateObjective):
        model = recipe.model.skeleton(recipe.data.vocabulary(), length)
        rows = recipe.data.build(None).batch(0, 0, COUNTED_ROWS).tokens_bt
        generator = torch.Generator().manual_seed(0)
        pairs = len(pairs_of(rows, model.end_token, objective.rule, generator=generator)) / COUNTED_ROWS
        unseen = pairs - objective.rule.per_row(length) * objective.rule.rate
        per_step += 3 * unseen * model.head.pair_flops() * recipe.batch.sequences
    return max(1, round(training_flops(reference) / per_step))


def matched(recipe: Recipe, reference: Recipe) -> Recipe:
    """The recipe with so many steps that it spends the reference's FLOPs."""
    assert recipe.budget.steps is not None
    steps = round(recipe.budget.steps * training_flops(reference) / training_flops(recipe))
    return recipe.model_copy(update={"budget": Budget(steps=max(1, steps))})


def paths(trained: Trained) -> Probe:
    """Path accuracy at every checkpoint, and when it left the plateau."""
    from torchstone.train.run import load_run

    s, steps = trained.cell.settings, trained.summary.steps
    found = planning(trained.model, trained.data, s["graphs"])
    metrics = {"path_accuracy": found.accuracy, "first_step": found.first_step}
    marks = list(range(s["every"], steps, s["every"]))
    curve = [
        planning(load_run(trained.cell.directory / "run", step)[1], trained.data, s["graphs"]).accuracy
        for step in marks
    ]
    marks, curve = [*marks, steps], [*curve, found.accuracy]
    left = [mark for mark, accuracy in zip(marks, curve, strict=True) if accuracy > found.guess + LEFT]
    if left:
        metrics["left_plateau"] = float(left[0])
    flops = training_flops(trained.recipe) / steps
    axes = {"steps": tuple(map(float, marks)), "FLOPs": tuple(mark * flops for mark in marks)}
    items = {"path_accuracy": {f"graph {row}": value for row, value in enumerate(found.exact_b)}}
    extra = {"seconds": trained.summary.seconds, "steps": steps, "guess": found.guess}
    return Probe(metrics, items, {"path accuracy": Series(axes=axes, values=tuple(curve))}, extra)


def gaps(trained: Trained) -> Probe:
    """Losses of held-out middles, and of the same texts without a goal; each where the model has learned it."""
    t, data = trained.cell.settings["text"], trained.data
    asked = held_out_gaps(data, t["gaps"], t["middle"])
    found: dict[str, list[float]] = {}
    turned = data.settings.order == "goal-first"
    if turned or isinstance(trained.model, BeliefState):
        found["infill_loss"] = infilling_losses(trained.model, asked, data.fim_token, data.end_token)
    if not turned:
        found["plain_loss"] = plain_losses(trained.model, asked)
    items = {name: {f"text {row}": value for row, value in enumerate(values)} for name, values in found.items()}
    extra = {"seconds": trained.summary.seconds, "steps": trained.summary.steps}
    return Probe({name: fmean(values) for name, values in found.items()}, items, extra=extra)


def _by_arm(cells: Cells) -> dict[str, list[tuple[Cell, Measurement]]]:
    rows: dict[str, list[tuple[Cell, Measurement]]] = {}
    for cell, measurement in cells:
        rows.setdefault(cell.arm.name, []).append((cell, measurement))
    return rows


def tables(cells: Cells) -> tuple[Table, ...]:
    """Which seeds solve the task and when, and what every arm costs."""
    rows, costs = [], []
    for arm, found in _by_arm(cells).items():
        recipe = load_recipe(found[0][0].arm.settings["recipe"])
        seconds = fmean(one.extra["seconds"] for _, one in found)
        steps = recipe.budget.steps
        costs.append(
            (arm, steps, counts_of(recipe).training_flops_per_token / 3e6, training_flops(recipe) / 1e12, seconds)
        )
        accuracies = [one.metrics["path_accuracy"] for _, one in found if "path_accuracy" in one.metrics]
        if accuracies:
            left = [one.metrics.get("left_plateau") for _, one in found]
            said = ", ".join("never" if step is None else f"{step:.0f}" for step in left)
            solved = sum(accuracy >= SOLVED for accuracy in accuracies)
            rows.append((arm, fmean(accuracies), min(accuracies), f"{solved} of {len(accuracies)}", said))
    heads = ("arm", "paths right", "least", f"seeds at {SOLVED:g} or more", "plateau left after (steps, by seed)")
    note = "means over seeds; 'never' is an arm that stayed within 0.1 of guessing"
    cost_heads = ("arm", "steps", "forward MFLOPs per token", "training TFLOPs", "seconds")
    return (
        Table(title="Planning", columns=heads, rows=tuple(rows), note=note),
        Table(title="What training costs", columns=cost_heads, rows=tuple(costs), note="seconds are means over seeds"),
    )


def figures(cells: Cells) -> tuple[Figure, ...]:
    """Path accuracy against steps, with the line of guessing."""
    lines = []
    guess, last = None, 0.0
    for arm, found in _by_arm(cells).items():
        curves = [one.series["path accuracy"] for _, one in found if "path accuracy" in one.series]
        if curves:
            columns = list(zip(*(curve.values for curve in curves), strict=True))
            x = curves[0].axes["steps"]
            guess, last = found[0][1].extra["guess"], max(last, x[-1])
            y = tuple(fmean(column) for column in columns)
            lines.append(Line(name=arm, x=x, y=y, low=tuple(map(min, columns)), high=tuple(map(max, columns))))
    if guess is not None:
        lines.append(Line(name="guessing the arm", x=(0.0, last), y=(guess, guess)))
    note = "mean and range over seeds; all arms end at equal training FLOPs"
    figure = Figure(title="Whole paths right", x_label="step", y_label="path accuracy", lines=tuple(lines), note=note)
    return (figure,) if lines else ()


def beside(cells: Cells) -> tuple[PaperFigure, ...]:
    """The paper's results on star graphs, and ours."""
    found = _by_arm(cells)

    def ours(arm: str) -> str:
        values = [one.metrics["path_accuracy"] for _, one in found.get(arm, ()) if "path_accuracy" in one.metrics]
        return f"{fmean(values):.2f}" if values else "–"

    setting = "paths right on a star graph"
    small = "G(2,5), G(2,10) and G(5,5) with 50 labels, 8M samples"
    return (
        PaperFigure(setting=f"{setting}, belief state", paper="about 1.00", ours=ours("belief-state"), note=small),
        PaperFigure(setting=f"{setting}, next token", paper="about 1/arms", ours=ours("next-token"), note=small),
        PaperFigure(setting=f"{setting}, no pairs", paper="hard graphs are not solved", ours=ours("empty-suffix")),
    )
