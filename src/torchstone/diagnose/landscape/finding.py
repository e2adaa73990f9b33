"""The landscape around a checkpoint: the line to another one, curvature along it, and where the run's checkpoints lie.

    torchstone diagnose landscape runs/mine --against 1000 --before-decay 1800
    finding = landscape_finding(open_subject("runs/mine"), load_texts([]), against="1000", before_decay="1800")

Wen et al. 2024 (arXiv 2410.05192) picture training as a river in a steep valley. With three checkpoints of one run, an earlier
one (`against`), the plateau just before a decay (`before_decay`) and the model itself,

    progress = model − against            along the river: little curvature, no barrier, the loss falls along the line
    decay    = model − before_decay       across the valley: large curvature

Each direction stands beside its control: a random direction in which every tensor has the norm that it has there. From the
earlier checkpoint, the loss along that one shows how far the same distance leads anywhere else.

Pitfall: all numbers are of the texts given. Curvature is of the mean loss over a few rows. Gradients of a model in bfloat16 or
float16 are too coarse for it, and such a model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.landscape.checkpoints import checkpoint_of, earliest, trajectory
from torchstone.diagnose.landscape.curvature import NoSecondDerivative, TensorLoss, curvature, curvature_by_differences
from torchstone.diagnose.landscape.decay_split import decay_split, token_losses
from torchstone.diagnose.landscape.directions import Projection, cosine, norm, projections, random_like
from torchstone.diagnose.landscape.interpolate import LossFn, LossLine, interpolate, line_of_alphas, loss_of, walk
from torchstone.diagnose.landscape.split import EntropySplit
from torchstone.diagnose.landscape.states import State, difference, own_names, parameters_of, state_of, with_ties
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.report.finding import Finding
from torchstone.report.result import Figure, Line, Table

DEFAULT_LENGTH = 256
NO_BARRIER = 0.01  # nats
PROGRESS, DECAY = "progress", "decay"
DRAWS = 8  # random directions beside each direction
CONTROL = (
    "Random directions in which every tensor has the norm that it has in the direction between the checkpoints: how the loss "
    f"changes over the same distance anywhere else, and what curvature is usual; {DRAWS} draws, their mean and range."
)
Points = Sequence[tuple[int, Projection]]


def landscape_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    against: str | None = None,
    before_decay: str | None = None,
    reference: str | None = None,
    alphas: tuple[float, ...] = line_of_alphas(),
    length: int | None = None,
    sequences: int = 32,
    curvature_sequences: int = 8,
    seed: int = 0,
) -> Finding:
    """The loss on the line to another checkpoint, curvature along directions between checkpoints, and where others lie.

    Args:
        against: the other end of the line: a step of the same run, another run or model, or RUN@STEP. None: the first checkpoint
            that the run kept, the second where the first is the model itself.
        before_decay: the checkpoint just before the model's decay, named likewise, for the decay direction.
        reference: with before_decay, a model of the same tokenizer whose entropy sorts the tokens that the decay helped.
        alphas: places on the line, 0 is the other checkpoint and 1 the model; 0, 0.5 and 1 are always among them.
        length: tokens of a row; None: 256, or what the model saw at once in training if that is less.
        sequences: rows of which the loss is the mean.
        curvature_sequences: how many of them curvature is measured on.
        seed: of the random directions.

    Raises:
        ConfigError: a checkpoint that is not there, of another architecture, or equal to the model. DataError: texts too short.
    """
    _check(subject, curvature_sequences, against, before_decay, reference)
    tokens_nt = token_rows(subject, texts, _length(subject, length), sequences)
    where = earliest(subject) if against is None else against
    other, own = checkpoint_of(subject, where), state_of(subject.model)
    names = own_names(subject.model)
    directions = {PROGRESS: _between(names, own, other)}
    plateau = None if before_decay is None else checkpoint_of(subject, before_decay)
    if plateau is not None:
        directions[DECAY] = _between(names, own, plateau)
    _require_apart(directions, where, before_decay)
    split: EntropySplit | None = None
    if plateau is not None and reference is not None:
        split = decay_split(subject, plateau, tokens_nt, open_subject(reference, device=subject.device))
    loss_fn = loss_of(subject.model, lambda: float(token_losses(subject, tokens_nt).double().mean()))
    line = interpolate(other, own, alphas, loss_fn)
    control = _control(subject, other, directions[PROGRESS], line.alphas, loss_fn, seed)
    curved = _curvatures(subject, tokens_nt[:curvature_sequences], directions, seed)
    points = _points(subject, other, directions)
    return Finding(
        analysis="landscape",
        title="Loss landscape between checkpoints",
        question="Is there a barrier between two checkpoints, and how steep is the loss along the directions between them?",
        subject=subject.describe(),
        answer=_answer(line, control, curved, where),
        control=CONTROL,
        tables=(*_line_tables(line, control), _direction_table(directions, curved), *_more_tables(points, split)),
        figures=(_line_figure(line, control), *_trajectory_figures(points)),
        notes=_notes(tokens_nt, curvature_sequences, where),
    )


def _notes(tokens_nt: Tensor, curvature_sequences: int, where: str) -> tuple[str, ...]:
    return (
        f"{tokens_nt.shape[0]} rows of {tokens_nt.shape[1]} tokens; curvature on the first "
        f"{min(curvature_sequences, tokens_nt.shape[0])}. Exact "
        "curvature is from second derivatives; where a layer has none, that of the control is from gradients.",
        f"The line runs from {_place(where)} (α = 0) to the model (α = 1). No barrier means at most {NO_BARRIER:g} nats.",
    )


def _length(subject: Subject, length: int | None) -> int:
    return min(subject.trained_length or DEFAULT_LENGTH, DEFAULT_LENGTH) if length is None else length


def _control(
    subject: Subject, origin: State, direction: State, distances: Sequence[float], loss_fn: LossFn, seed: int
) -> list[Spread]:
    """The loss at each distance along random directions like `direction`."""
    walks = [
        walk(origin, with_ties(subject.model, random_like(direction, seed + i)), distances, loss_fn)
        for i in range(DRAWS)
    ]
    return [Spread.of(losses) for losses in zip(*walks, strict=True)]


def _points(subject: Subject, other: State, directions: Mapping[str, State]) -> Points:
    """Every checkpoint of the subject's run, seen from the other end of the line."""
    names = own_names(subject.model)
    origin = _kept(names, other)
    return [(step, projections([_kept(names, s)], origin, directions)[0]) for step, s in trajectory(subject)]


def _place(where: str) -> str:
    return f"step {where}" if where.isdecimal() else where


def _between(names: Sequence[str], later: State, earlier: State) -> dict[str, Tensor]:
    """later − earlier, every parameter once."""
    return difference(_kept(names, later), _kept(names, earlier))


def _kept(names: Sequence[str], state: State) -> dict[str, Tensor]:
    return {name: state[name] for name in names}


def _check(
    subject: Subject, curvature_sequences: int, against: str | None, before_decay: str | None, reference: str | None
) -> None:
    if against is not None and against == before_decay:
        raise ConfigError(
            f"against and before_decay were both given as {against}, so that progress and decay are one direction; give an "
            "earlier checkpoint with against, or leave before_decay out."
        )
    if narrow := sorted({str(p.dtype) for p in subject.model.parameters() if p.is_floating_point() and p.itemsize < 4}):
        raise ConfigError(
            f"{subject.name} holds weights in {narrow[0].removeprefix('torch.')}, whose gradients are too coarse for curvature, "
            "and points on a line between near checkpoints round to the same weights; open it in float32 (--dtype float32, "
            "which is the default)."
        )
    if curvature_sequences < 1:
        raise ConfigError(f"curvature_sequences was given as {curvature_sequences}; it must be at least 1.")
    if reference is not None and before_decay is None:
        raise ConfigError(
            f"reference={reference} sorts the tokens that a decay helped, and no before_decay says where the decay begins; give "
            "the checkpoint just before it."
        )


def _require_apart(directions: Mapping[str, State], against: str, before_decay: str | None) -> None:
    for direction, where in zip(directions.values(), (against, before_decay), strict=False):
        if norm(direction) == 0:
            raise ConfigError(
                f"the checkpoint {where} has the very weights of the model, so that there is no direction between them; "
                "name another one."
            )
    if DECAY in directions and norm(difference(directions[PROGRESS], directions[DECAY])) == 0:
        raise ConfigError(
            f"against={against} and before_decay={before_decay} are the same weights, so that progress and decay are one "
            "direction; give an earlier checkpoint with against, or leave before_decay out."
        )


@dataclass(frozen=True)
class Spread:
    """Mean and range over random directions."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of some numbers."""
        return cls(sum(values) / len(values), min(values), max(values))


@dataclass(frozen=True)
class Curved:
    """Curvature along a direction: exact (None where a layer has no second derivative), from gradients on both sides, and along
    random directions."""

    exact: float | None
    differences: float
    random: Spread


def token_loss(subject: Subject, tokens_nt: Tensor) -> TensorLoss:
    """The mean loss of rows of tokens as a differentiable function of the subject's parameters."""
    logits = _Logits(subject)

    def loss(values: dict[str, Tensor]) -> Tensor:
        given = {f"model.{name}": value for name, value in values.items()}
        logits_btv = functional_call(logits, given, (tokens_nt[:, :-1],))
        return functional.cross_entropy(logits_btv.flatten(0, 1).float(), tokens_nt[:, 1:].flatten())

    return loss


def _curvatures(subject: Subject, tokens_nt: Tensor, directions: Mapping[str, State], seed: int) -> dict[str, Curved]:
    parameters, loss = parameters_of(subject.model), token_loss(subject, tokens_nt)

    def curved(direction: State) -> Curved:
        measure: Callable[[TensorLoss, State, State], float] = curvature
        exact: float | None = None
        try:
            exact = curvature(loss, parameters, direction)
        except NoSecondDerivative:
            measure = curvature_by_differences
        controls = (random_like(direction, seed + i) for i in range(DRAWS))
        random = Spread.of([measure(loss, parameters, control) for control in controls])
        return Curved(exact, curvature_by_differences(loss, parameters, direction), random)

    return {name: curved({key: value[key] for key in parameters}) for name, value in directions.items()}


class _Logits(nn.Module):
    """A subject's logits as a module whose parameters can be replaced for one call."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self._subject = subject.model, (subject,)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        return self._subject[0].logits(tokens_bt)


def _answer(line: LossLine, control: Sequence[Spread], curved: Mapping[str, Curved], where: str) -> str:
    barrier = f"a barrier of {line.barrier:.4f} nats above the chord" if line.barrier > NO_BARRIER else "no barrier"
    course = "and the loss falls all the way" if line.falls else "and the loss does not fall all the way"
    crossing = "below both ends" if line.midpoint < 0 else "not below both ends"
    away, start = control[line.alphas.index(1.0)], line.at(0.0)
    steep = ", ".join(
        f"{one.differences if one.exact is None else one.exact:.3g} along {name} against {one.random.mean:.3g} "
        f"({one.random.low:.3g} to {one.random.high:.3g}) at random"
        for name, one in curved.items()
    )
    return (
        f"From {_place(where)} ({start:.4f} nats) to the model ({line.at(1.0):.4f}) there is {barrier}, {course}; the middle of "
        f"the line is {crossing}{' (a valley crossed)' if line.midpoint < 0 else ''}. The same distance in {DRAWS} random "
        f"directions changes the loss by {away.mean - start:+.4f} ({away.low - start:+.4f} to {away.high - start:+.4f}). "
        f"Curvature at the model: {steep}."
    )


def _line_tables(line: LossLine, control: Sequence[Spread]) -> tuple[Table, Table]:
    return _line_table(line, control), _shape_table(line)


def _line_table(line: LossLine, control: Sequence[Spread]) -> Table:
    rows = tuple(
        (alpha, loss, one.mean, one.low, one.high)
        for alpha, loss, one in zip(line.alphas, line.losses, control, strict=True)
    )
    columns = ("alpha", "loss", "random direction", "lowest", "highest")
    note = f"nats per token; {DRAWS} random directions: mean, lowest and highest"
    return Table(title="Loss along the line", columns=columns, rows=rows, note=note)


def _shape_table(line: LossLine) -> Table:
    rows = (
        ("midpoint", line.midpoint, "the middle above the lower end; negative: a valley is crossed"),
        ("bulge", line.bulge, "highest measured point inside above the chord; negative: the line sags"),
        ("climb", line.climb, "highest measured point inside above the other checkpoint; negative: none is as high"),
    )
    return Table(title="Shape of the line", columns=("number", "nats", "meaning"), rows=rows, note="nats per token")


def _direction_table(directions: Mapping[str, State], curved: Mapping[str, Curved]) -> Table:
    rows = tuple(
        (name, norm(directions[name]), one.exact, one.differences, one.random.mean, one.random.low, one.random.high)
        for name, one in curved.items()
    )
    columns = (
        "direction", "length", "curvature", "curvature from gradients", "curvature, random direction", "lowest", "highest",
    )  # fmt: skip
    note = "curvature: second derivative of the loss along the direction at length 1, at the model"
    note += f"; {DRAWS} random directions: mean, lowest and highest"
    if len(directions) == 2:
        note += f"; cosine of the two directions {cosine(directions[PROGRESS], directions[DECAY]):.4f}"
    return Table(title="Directions", columns=columns, rows=rows, note=note)


def _more_tables(points: Points, split: EntropySplit | None) -> tuple[Table, ...]:
    return (*_trajectory_tables(points), *_split_tables(split))


def _trajectory_tables(points: Points) -> tuple[Table, ...]:
    if not points:
        return ()
    names = list(points[0][1].along)
    rows = tuple(
        (step, p.distance, *(p.along[name] for name in names), *(p.cosine[name] for name in names), p.share)
        for step, p in points
    )
    columns = ("step", "distance", *(f"along {name}" for name in names), *(f"cosine {name}" for name in names), "share")
    note = "displacement of the run's checkpoints from the other end of the line; share: part of its square in these directions"
    return (Table(title="Checkpoints of the run", columns=columns, rows=rows, note=note),)


def _split_tables(split: EntropySplit | None) -> tuple[Table, ...]:
    if split is None:
        return ()
    rows = tuple((i, *pair) for i, pair in enumerate(zip(split.entropy, split.change, strict=True), start=1))
    note = (
        "deciles of equal mass by the reference model's entropy; negative: the decay lowered the loss; nats per token"
    )
    columns = ("decile", "entropy", "change of the loss")
    return (Table(title="Tokens that the decay helped", columns=columns, rows=rows, note=note),)


def _line_figure(line: LossLine, control: Sequence[Spread]) -> Figure:
    chord = (line.at(0.0), line.at(1.0))
    lines = (
        Line(name="between the checkpoints", x=line.alphas, y=line.losses),
        Line(name="chord", x=(0.0, 1.0), y=chord),
        Line(
            name="random direction",
            x=line.alphas,
            y=tuple(one.mean for one in control),
            low=tuple(one.low for one in control),
            high=tuple(one.high for one in control),
        ),
    )
    return Figure(title="Loss along the line", x_label="α", y_label="nats per token", lines=lines)


def _trajectory_figures(points: Points) -> tuple[Figure, ...]:
    if len(points) < 2:
        return ()
    steps = tuple(float(step) for step, _ in points)
    lines = tuple(Line(name=name, x=steps, y=tuple(p.along[name] for _, p in points)) for name in points[0][1].along)
    return (Figure(title="Where checkpoints lie", x_label="step", y_label="length along the direction", lines=lines),)
