"""The tree of runs as a finding: what each branch cost and gained, next to what its parent did with the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchstone.report import numbers
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, Table
from torchstone.train.tree import RunTree, TreeRun

ANALYSIS = "runs"
CONTROL = (
    "A branch is compared with its parent after as many tokens as at the branch’s last evaluation, or, where the parent ended "
    "before, with the nearest ancestor that went on as far: “below parent” is what the branch’s plan is worth beyond going on. "
    "Between two evaluations the other loss is read off the straight line between them."
)


def run_tree_finding(tree: RunTree) -> Finding:
    """Tables, curves and notes of a tree of runs."""
    return Finding(
        analysis=ANALYSIS,
        title="Runs and their branches",
        question="What did each branch cost, and what did it gain?",
        subject=_subject(tree.runs),
        answer=_answer(tree),
        control=CONTROL,
        tables=(_gains(tree), _costs(tree)),
        figures=_figures(tree.runs),
        notes=_notes(tree),
    )


def line_of(run: TreeRun) -> str:
    """One run in a line: where it begins, what it cost and what it gained."""
    begins = f" from step {run.begin.steps:,}" if run.record.origin else ""
    places = _places([run])
    loss = "no evaluation yet" if run.loss_end is None else f"loss {run.loss_end:.{places}f}"
    if run.gained is not None:
        loss = f"loss {run.loss_begin:.{places}f} to {run.loss_end:.{places}f} (gained {run.gained:+.{places}f})"
    if run.evaluated and run.evaluated.steps < run.end.steps:
        loss += f" at step {run.evaluated.steps:,}"
    parts = [
        f"{run.kind}{begins}, {run.recipe.schedule.kind}",
        f"{run.own.steps:,} steps",
        f"{run.own.flops:.3g} FLOPs",
        f"{run.own.seconds:.3g} s",
        loss,
    ]
    if run.end.steps < run.planned:
        parts.append(f"stands at step {run.end.steps:,} of {run.planned:,}")
    return f"{run.name}: {', '.join(parts)}".replace("\n", " ")


def _places(runs: Sequence[TreeRun]) -> int:
    """Decimals at which the losses of runs show the smallest gain among them with two digits; at least 4."""
    gains = [abs(run.gained) for run in runs if run.gained]
    return max(4, numbers.places_for(min(gains), most=6)) if gains else 4


def _loss(value: float | None, places: int) -> str | None:
    return None if value is None else f"{value:.{places}f}"


def _exponent(branches: Sequence[TreeRun]) -> int:
    """The power of ten of FLOPs at which gains of these branches are readable numbers."""
    most = max((run.measured.flops for run in branches if run.measured), default=0.0)
    return math.floor(math.log10(most)) if most > 0 else 0


def _subject(runs: Sequence[TreeRun]) -> str:
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    kinds = dict.fromkeys(str(run.recipe.model.kind) for run in runs)
    return f"{', '.join(kinds)} ({count})" if runs else "no run"


def _answer(tree: RunTree) -> str:
    total, separate = tree.total.flops, tree.separate.flops
    shared = f"The tree cost {total:.3g} FLOPs, trunks counted once"
    if total > 0 and separate > total * (1 + 1e-9):
        shared += f"; the same runs without a shared trunk would have cost {separate:.3g}, {separate / total:.2f} times as much"
    gains = [(run.gained, run.measured, run) for run in tree.branches if run.gained is not None and run.measured]
    if not gains:
        return f"{shared}. No branch has an evaluation of its own yet."
    gained, cost, best = max(gains, key=lambda found: found[0])
    said = "gained most" if len(gains) > 1 else "gained"
    places = _places([best])
    return (
        f"{best.name} {said}: {gained:.{places}f} nats per token (from {best.loss_begin:.{places}f} to "
        f"{best.loss_end:.{places}f}) in "
        f"{cost.steps:,} steps, for {cost.flops:.3g} FLOPs. {shared}."
    )


def _gains(tree: RunTree) -> Table:
    exponent, places = _exponent(tree.branches), _places(tree.runs)
    rows = []
    for run in tree.runs:
        cost, per, compared = run.measured, run.gained_per_flop, tree.compared(run)
        rows.append(
            (
                run.name,
                _place(run, tree.parent(run)),
                cost.steps if cost else None,
                cost.flops if cost else None,
                _loss(run.loss_begin, places),
                _loss(run.loss_end, places),
                run.gained,
                None if per is None else per * 10.0**exponent,
                compared[1] - run.loss_end if compared and run.loss_end is not None else None,
            )
        )
    return Table(
        title="What each run cost and gained",
        columns=(
            "run",
            "from",
            "steps",
            "FLOPs",
            "before",
            "after",
            "gained",
            f"per 1e{exponent} FLOPs",
            "below parent",
        ),
        rows=tuple(rows),
        note="Steps and FLOPs are the run’s own until its last evaluation. Before and after: validation loss (nats per token) at "
        "the branching point, and the last one; gained is their difference. Below parent: the parent’s loss after as many "
        "tokens, minus the run’s; where the parent ended before, that of its nearest ancestor that went on.",
    )


def _place(run: TreeRun, parent: TreeRun | None) -> str:
    """Where a run begins: `plateau@800`."""
    if run.record.origin is None:
        return "–"
    return f"{parent.name if parent else 'not found'}@{run.begin.steps}"


def _costs(tree: RunTree) -> Table:
    total = tree.total
    rows: list[tuple[str | float | int | None, ...]] = [
        (
            run.name,
            run.recipe.schedule.kind,
            run.own.steps,
            run.own.tokens,
            run.own.flops,
            run.own.seconds,
            run.end.steps,
            run.end.flops,
        )
        for run in tree.runs
    ]
    rows.append(("the whole tree", None, total.steps, total.tokens, total.flops, total.seconds, None, None))
    return Table(
        title="What each run cost",
        columns=(
            "run",
            "schedule",
            "steps",
            "tokens",
            "FLOPs",
            "seconds",
            "steps with trunk",
            "FLOPs with trunk",
        ),
        rows=tuple(rows),
        note="Steps, tokens, FLOPs and seconds are the run’s own; “with trunk” counts everything since the root’s first step. "
        "The whole tree counts shared trunks once.",
    )


def _figures(runs: Sequence[TreeRun]) -> tuple[Figure, ...]:
    validation = [line for run in runs if (line := _losses(run)).x]
    rates = [
        Line(name=run.name, x=tuple(curve["tokens"]), y=tuple(curve["learning_rate"]))
        for run in runs
        if (curve := run.history["train"])["tokens"] and curve.get("learning_rate")
    ]
    figures = []
    if validation:
        figures.append(
            Figure(
                title="Validation loss",
                x_label="training tokens",
                y_label="validation loss (nats/token)",
                lines=tuple(validation),
                note="A branch begins at its branching point.",
            )
        )
    if rates:
        figures.append(
            Figure(title="Learning rate", x_label="training tokens", y_label="learning rate", lines=tuple(rates))
        )
    return tuple(figures)


def _losses(run: TreeRun) -> Line:
    """Validation losses of a run's own evaluations, from the branching point on."""
    curve = run.history["validation"]
    x, y = list(curve["tokens"]), list(curve["loss"])
    if run.loss_begin is not None:
        x, y = [run.begin.tokens, *x], [run.loss_begin, *y]
    return Line(name=run.name, x=tuple(x), y=tuple(y))


def _notes(tree: RunTree) -> tuple[str, ...]:
    notes = list(tree.problems)
    for run in tree.runs:
        if run.end.steps < run.planned:
            notes.append(f"{run.name} stands at step {run.end.steps:,} of {run.planned:,}.")
        if run.evaluated and run.evaluated.steps < run.end.steps:
            notes.append(f"{run.name} was last evaluated at step {run.evaluated.steps:,} of {run.end.steps:,}.")
        if run.approximate:
            notes.append(f"{run.name}: the loss at the branching point is its parent's last one before it.")
        if run.record.origin and run.record.origin.changes:
            notes.append(f"{run.name} differs from its parent: {'; '.join(run.record.origin.changes)}.")
        notes += [f"{run.name}: {taint}." for taint in run.record.taints]
    return tuple(notes)
