"""How the layer-gradient study measures a cell: one trained model per seed for all of its arms, responses, tables.

A cell is one kind of response on one model. Its numbers per problem:

    nuclear          nuclear norm of the gradient, mean over layers, geometric mean over Q, K, V and O (whose norms differ
                     several-fold, and none of which should decide alone)
    per_loss         the same, divided by the problem's loss
    separation       ln(nuclear with the next problem's response / nuclear with its own)

and per cell the MAD of the mean curve (geometric mean over the projections), which the paper tabulates.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchstone.data.synthetic.addition import Addition, encode
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.gradients.pairs import Example, matched
from torchstone.diagnose.gradients.profile import Profile, gradient_profile
from torchstone.lab.study import Cell, Measurement
from torchstone.recipe.load import load_recipe
from torchstone.report.result import Figure, Line, Metric, PaperFigure, Series, Table
from torchstone.storage.lease import Lease

WAIT_SECONDS = 0.2
METRICS = (
    Metric(name="nuclear", label="nuclear norm of gradients", better="neither"),
    Metric(name="per_loss", label="nuclear norm / loss", better="neither"),
    Metric(name="separation", label="ln(irrelevant / correct)", better="neither"),
    Metric(name="mad", label="MAD of the curve over layers", better="neither"),
    Metric(name="effective_rank", label="effective rank of gradients", better="neither"),
    Metric(name="loss", label="loss of the response", unit="nats/token", better="lower"),
    Metric(name="tokens", label="scored tokens", better="neither"),
)
PAPER = "Qwen2-1.5B on AQuA, detailed reasoning against none; from a secondary summary"
Cells = Sequence[tuple[Cell, Measurement]]


def subject_of(cell: Cell) -> tuple[Any, Addition]:
    """The arm's model as a subject, and its data. All trained arms of a seed share one run, beside the cells.

    The first to need it trains it under a lease; the others wait. A run is resumed if its trainer was stopped.
    """
    from torchstone.train.run import load_run, train

    recipe = load_recipe(cell.arm.settings["recipe"], [f"seed={cell.seed}"])
    if not cell.arm.settings["trained"]:
        data = recipe.data.build(None)
        model = recipe.model.build(data.vocab_size, data.length, recipe.seed).eval()
    else:
        folder = cell.directory.parents[2] / "trained"
        folder.mkdir(exist_ok=True)
        lease = Lease(folder / f"seed-{cell.seed}.lease")
        while not lease.acquire():
            time.sleep(WAIT_SECONDS)
        try:
            train(recipe, folder / f"seed-{cell.seed}", progress=cell.report)
        finally:
            lease.release()
        recipe, model, data = load_run(folder / f"seed-{cell.seed}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_subject(model.to(device)), data


def examples(data: Addition, count: int, response: str, shift: int, seed: int) -> list[Example]:
    """Held-out problems, each with the response of the problem `shift` places on.

    Args:
        response: `fast`, `slow`, or `slow-matched`: slow, scored on as many random tokens as the problem's own fast response
            has.
    """
    problems, generator = data.problems(count), np.random.default_rng([seed, 20241031])
    found = []
    for number, problem in enumerate(problems):
        answer = problems[(number + shift) % count]
        text = problem.prompt + (answer.fast if response == "fast" else answer.slow)
        example = Example.of(encode(text).tolist(), len(problem.prompt), id=problem.prompt.rstrip("="))
        if response == "slow-matched":
            example = matched(example, len(problem.fast), generator)
        found.append(example)
    return found


def measure(cell: Cell) -> Measurement:
    """Gradients of one kind of response, its own and the next problem's."""
    subject, data = subject_of(cell)
    count, response = cell.settings["problems"], cell.arm.settings["response"]
    own, other = (
        gradient_profile(subject, examples(data, count, response, shift, cell.seed), batch_size=32) for shift in (0, 1)
    )
    nuclear_n, foreign_n = own.overall(), other.overall()
    values = {
        "nuclear": nuclear_n,
        "per_loss": nuclear_n / own.losses_n,
        "separation": (foreign_n / nuclear_n).log(),
        "effective_rank": own.overall("effective_rank"),
        "loss": own.losses_n,
        "tokens": own.targets_n.double(),
    }
    layers = tuple(map(float, own.layers))
    return Measurement(
        metrics={name: float(value_n.mean()) for name, value_n in values.items()} | {"mad": _together(own.mad())},
        items={name: dict(zip(own.ids, value_n.tolist(), strict=True)) for name, value_n in values.items()},
        series={
            f"nuclear {matrix}": Series(axes={"layer": layers}, values=tuple(curve.tolist()))
            for matrix, curve in zip(own.matrices, own.curve().T, strict=True)
        },
        extra={"own": _by_matrix(own), "irrelevant": _by_matrix(other), "rd": own.compare(other).rd},
    )


def _together(by_matrix: dict[str, float]) -> float:
    return float(np.exp(np.mean(np.log(list(by_matrix.values())))))


def _by_matrix(profile: Profile) -> dict[str, Any]:
    """Loss, and by matrix the mean nuclear norm over layers and the MAD."""
    means = profile.curve().mean(0).tolist()
    return {
        "loss": float(profile.losses_n.mean()),
        "nuclear": dict(zip(profile.matrices, means, strict=True)),
        "mad": profile.mad(),
    }


def _mean(cells: Cells, arm: str, which: str, *path: str) -> float:
    """Mean over seeds of a number in `extra`."""
    found = []
    for cell, measurement in cells:
        if cell.arm.name == arm:
            value: Any = measurement.extra[which]
            for step in path:
                value = value[step]
            found.append(value)
    return float(np.mean(found))


def by_projection(cells: Cells) -> Table:
    """Every condition by projection, as in the paper's tables: mean over problems, layers and seeds."""
    rows: list[tuple[str | float | int | None, ...]] = []
    for arm in dict.fromkeys(cell.arm.name for cell, _ in cells):
        for which, label in (("own", arm), ("irrelevant", f"{arm}, irrelevant")):
            numbers = [_mean(cells, arm, which, kind, matrix) for kind in ("nuclear", "mad") for matrix in "qkvo"]
            loss = _mean(cells, arm, which, "loss")
            rows.append((label, *(float(f"{x:.3g}") for x in (loss, *numbers))))
    columns = ("condition", "loss", *(f"nuclear {m.upper()}" for m in "qkvo"), *(f"MAD {m.upper()}" for m in "qkvo"))
    return Table(
        title="Gradients by condition and projection", columns=columns, rows=tuple(rows), note="means over seeds"
    )


def by_seed(cells: Cells) -> Table:
    """The ratios that decide the first claim, for every model: intervals over problems do not hold the models' spread."""
    nuclear = {(cell.arm.name, cell.seed): measurement.metrics["nuclear"] for cell, measurement in cells}
    rows: list[tuple[str | float | int | None, ...]] = []
    for seed in sorted({seed for _, seed in nuclear}):
        pairs = [
            ("slow", "fast"),
            ("slow-matched", "fast"),
            ("init.slow", "init.fast"),
            ("init.slow-matched", "init.fast"),
        ]
        ratios = [
            float(f"{nuclear[a, seed] / nuclear[b, seed]:.3g}") if {(a, seed), (b, seed)} <= nuclear.keys() else None
            for a, b in pairs
        ]
        rows.append((seed, *ratios))
    columns = ("seed", "slow / fast", "matched / fast", "untrained slow / fast", "untrained matched / fast")
    return Table(title="Ratios of nuclear norms by model", columns=columns, rows=tuple(rows))


def curves(cells: Cells) -> tuple[Figure, ...]:
    """Mean nuclear norm of each layer's gradients, one figure per projection, trained models."""
    figures = []
    for matrix in "qkvo":
        lines = []
        for arm in ("fast", "slow", "slow-matched"):
            found = [m.series[f"nuclear {matrix}"] for cell, m in cells if cell.arm.name == arm]
            if found:
                values = np.array([series.values for series in found], dtype=np.float64)
                lines.append(
                    Line(name=arm, x=found[0].axes["layer"], y=tuple(values.mean(0).tolist()),
                         low=tuple(values.min(0).tolist()), high=tuple(values.max(0).tolist()))
                )  # fmt: skip
        figures.append(
            Figure(title=f"Nuclear norm of gradients, {matrix.upper()}", x_label="layer", y_label="nuclear norm",
                   lines=tuple(lines), note="mean and range over models")
        )  # fmt: skip
    return tuple(figures)


def beside(cells: Cells) -> tuple[PaperFigure, ...]:
    """The paper's numbers and ours; empty where an arm is missing."""
    arms = {cell.arm.name for cell, _ in cells}
    if not {"fast", "slow"} <= arms:
        return ()

    def mads(arm: str) -> str:
        return ", ".join(f"{_mean(cells, arm, 'own', 'mad', m):.3g}" for m in "qkvo")

    def rd(arm: str) -> str:
        return f"{np.mean([_mean(cells, arm, 'rd', m) for m in 'qkvo']):.2g}"

    return (
        PaperFigure(
            setting="MAD of Q, K, V, O: bare answer → reasoning",
            paper="4.42, 7.06, 17.32, 12.91 → 0.28, 0.27, 0.64, 0.64", ours=f"{mads('fast')} → {mads('slow')}", note=PAPER,
        ),
        PaperFigure(
            setting="relative difference, irrelevant against correct: bare answer → reasoning",
            paper="below 0.01 → about 0.81", ours=f"{rd('fast')} → {rd('slow')}", note=PAPER,
        ),
    )  # fmt: skip
