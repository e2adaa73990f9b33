"""The tree of runs: which run branched or grew from which, what each cost, and what each gained.

Any run directories, or folders of them, are read and linked by the ids in `run.json`. Nothing is written, and nothing has to be
registered beforehand. Of every run:

    begin, end   steps, tokens, FLOPs and seconds at the branching point and now, ancestors included (the whole path)
    own          end − begin: what this run itself has cost, each token at the price of the model that saw it
    gained       validation loss at the branching point − the last one; more is better
    measured     own cost until that last evaluation, which is what was paid for `gained`
    total        of the tree: the sum of `own`, so that a trunk that several branches share counts once

Pitfalls: steps that a killed run did again count once. Seconds are those of training steps. A parent that cannot be found
counts up to the farthest branching point known of it. A loss at the branching point that nobody measured there is the
parent's nearest one before it (`approximate`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError, DataError, TorchstoneError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.storage.atomic import PARTIAL
from torchstone.train.budget import steps_of
from torchstone.train.events import AXES, METRICS, read_history
from torchstone.train.names import RECIPE, RECORD
from torchstone.train.record import Origin, RunRecord, read_record

SUMMARY = "summary.json"
INSIDE = ("checkpoints", "crash", "tensorboard", "wandb")  # folders of a run that hold no runs


@dataclass(frozen=True)
class Spent:
    """Where a run stands, or what a piece of it cost."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )

    def __sub__(self, other: Spent) -> Spent:
        return self + Spent(-other.steps, -other.tokens, -other.flops, -other.seconds)


@dataclass(frozen=True)
class TreeRun:
    """One run of the tree.

    Attributes:
        name: its directory, relative to what all runs of the tree have in common.
        directory, recipe, record: what it is.
        planned: step at which its budget ends.
        begin, end: at the branching point (zero for a root), and now.
        evaluated: at the last evaluation; None before the first.
        loss_begin, loss_end: validation loss at the branching point and the last one; None where there is none.
        approximate: whether `loss_begin` is the parent's nearest one before the branching point.
        history: curves of this run's own steps, as `read_history` gives them.
        parent: id of the parent in the tree, None for a root. depth: number of ancestors in the tree.
    """

    name: str
    directory: Path
    recipe: Recipe
    record: RunRecord
    planned: int
    begin: Spent
    end: Spent
    evaluated: Spent | None
    loss_begin: float | None
    loss_end: float | None
    approximate: bool
    history: Mapping[str, Mapping[str, Sequence[Any]]]
    parent: str | None
    depth: int

    @property
    def kind(self) -> str:
        """`run`, `branch` or `growth`."""
        return self.record.origin.kind if self.record.origin else "run"

    @property
    def own(self) -> Spent:
        """What this run itself has cost."""
        return self.end - self.begin

    @property
    def measured(self) -> Spent | None:
        """What this run itself had cost at its last evaluation; None before the first."""
        return self.evaluated - self.begin if self.evaluated else None

    @property
    def gained(self) -> float | None:
        """By how much the validation loss fell since the branching point."""
        known = self.loss_begin is not None and self.loss_end is not None
        return self.loss_begin - self.loss_end if known else None  # type: ignore[operator]

    @property
    def gained_per_flop(self) -> float | None:
        """`gained` by the FLOPs of this run itself until the last evaluation."""
        cost = self.measured.flops if self.measured else 0.0
        return None if self.gained is None or cost <= 0 else self.gained / cost

    def loss_at(self, tokens: float) -> float | None:
        """Validation loss after so many tokens, between two evaluations on the line between them; None outside."""
        curve = self.history["validation"]
        points = list(zip(curve["tokens"], curve["loss"], strict=True))
        if self.loss_begin is not None:
            points = [(self.begin.tokens, self.loss_begin), *points]
        for (before, high), (after, low) in zip(points, points[1:], strict=False):
            if before <= tokens <= after:
                return low if after == before else high + (low - high) * (tokens - before) / (after - before)
        return None


@dataclass(frozen=True)
class RunTree:
    """Runs with every parent before its children, and what is wrong with the records, in words."""

    runs: tuple[TreeRun, ...]
    problems: tuple[str, ...]

    @property
    def branches(self) -> tuple[TreeRun, ...]:
        """Runs that come from another one."""
        return tuple(run for run in self.runs if run.record.origin)

    def parent(self, run: TreeRun) -> TreeRun | None:
        """The run that another one comes from, if it is in the tree."""
        return next((one for one in self.runs if one.record.id == run.parent), None)

    def compared(self, run: TreeRun) -> tuple[TreeRun, float] | None:
        """The nearest ancestor that has a loss after as many tokens as a run's last evaluation, and that loss."""
        ancestor = self.parent(run)
        while ancestor is not None and run.evaluated is not None:
            loss = ancestor.loss_at(run.evaluated.tokens)
            if loss is not None:
                return ancestor, loss
            ancestor = self.parent(ancestor)
        return None

    def children(self, run: TreeRun | None) -> list[TreeRun]:
        """Runs that come from one, in order; of None, the roots."""
        return [one for one in self.runs if one.parent == (run.record.id if run else None)]

    @property
    def total(self) -> Spent:
        """What the whole tree has cost, shared trunks counted once."""
        absent: dict[str, Spent] = {}
        for run in self.runs:
            if run.record.origin and run.parent is None:
                known = absent.get(run.record.origin.run, Spent())
                absent[run.record.origin.run] = max(known, run.begin, key=lambda spent: spent.steps)
        return sum([*absent.values(), *(run.own for run in self.runs)], start=Spent())

    @property
    def separate(self) -> Spent:
        """What the runs would have cost without sharing anything, each trained from its first step."""
        return sum((run.end for run in self.runs), start=Spent())


@dataclass(frozen=True)
class _Found:
    """A run as read, before it is linked."""

    directory: Path
    recipe: Recipe
    record: RunRecord
    history: Mapping[str, Mapping[str, Sequence[Any]]]


def read_tree(paths: Iterable[str | Path]) -> RunTree:
    """The tree of all runs in `paths`: run directories, and folders that hold some at any depth.

    Parents that are elsewhere are looked for where the records of their children say.

    Raises:
        ConfigError: a path is not there, or there is no run in any of them. What is wrong with single runs is told in
            `problems`, and the others are read.
    """
    problems: list[str] = []
    found: dict[str, _Found] = {}
    waiting = [directory for path in paths for directory in _directories(Path(path))]
    if not waiting:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: no run there (no {RECORD}); give run directories, or a folder of them."
        )
    while waiting:
        directory = waiting.pop(0)
        run = _read(directory, problems)
        if run is None or _known(run, found, problems):
            continue
        found[run.record.id] = run
        origin = run.record.origin
        if origin and origin.directory and (directory / origin.directory / RECORD).is_file():
            waiting.append(directory / origin.directory)
    return RunTree(_linked(found, _parents(found, problems), problems), tuple(problems))


def _directories(path: Path) -> Iterator[Path]:
    """Run directories in a path, in order of their names."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give run directories, or a folder that holds some.")
    for folder, below, files in os.walk(path):
        below[:] = sorted(name for name in below if name not in INSIDE and PARTIAL not in name)
        if RECORD in files:
            yield Path(folder)


def _read(directory: Path, problems: list[str]) -> _Found | None:
    """The run in a directory; None, and a line in `problems`, if it cannot be read."""
    try:
        record, recipe = read_record(directory), load_recipe(directory / RECIPE)
        history, warnings = read_history(directory, _last(directory, steps_of(recipe)))
        _check_curves(directory, history)
    except (TorchstoneError, OSError) as error:
        problems.append(f"left out: {error}")
        return None
    problems += warnings
    return _Found(directory, recipe, record, history)


def _last(directory: Path, planned: int) -> int | None:
    """The last step of a run that is finished as planned; later records belong to steps that were done again. Else None."""
    try:
        steps = int(json.loads((directory / SUMMARY).read_bytes())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if steps >= planned else None


def _check_curves(directory: Path, history: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Raise DataError unless every training and validation record has the numbers that costs and gains are made of."""
    for kind in ("train", "validation"):
        for name in (*AXES, "loss"):
            column = history[kind][name]
            if len(column) != len(history[kind]["steps"]) or not all(type(value) in (int, float) for value in column):
                raise DataError(f"{directory / METRICS} has {kind} records without a number for {name}.")


def _known(run: _Found, found: Mapping[str, _Found], problems: list[str]) -> bool:
    """Whether a run is in `found` already; another directory of the same id is a copy, which is told."""
    first = found.get(run.record.id)
    if first is not None and first.directory.resolve() != run.directory.resolve():
        problems.append(f"left out: {run.directory} has the id of {first.directory}, of which it is a copy")
    return first is not None


def _parents(found: Mapping[str, _Found], problems: list[str]) -> dict[str, str | None]:
    """The parent of every run, by ids; None for roots, for those whose parent is not there, and where records go in a circle."""
    parents: dict[str, str | None] = {}
    for key, run in found.items():
        origin = run.record.origin
        parents[key] = origin.run if origin and origin.run in found else None
        if origin and origin.run not in found:
            where = f"{origin.directory} from there" if origin.directory else "an unknown place"
            problems.append(
                f"{run.directory} comes from run {origin.run} ({where}), which was not found: its steps up to {origin.step:,} "
                "count as one trunk"
            )
    for key in found:
        seen, one = [key], parents[key]
        while one is not None and one not in seen:
            seen, one = [*seen, one], parents[one]
        if one == key:
            problems.append(
                f"the records of {', '.join(str(found[name].directory) for name in seen)} name each other as parents; "
                f"{found[key].directory} is shown as a root"
            )
            parents[key] = None
    return parents


def _linked(found: Mapping[str, _Found], parents: Mapping[str, str | None], problems: list[str]) -> tuple[TreeRun, ...]:
    """All runs, depth first: roots by name, children by where they begin."""
    names = _names([run.directory for run in found.values()])
    linked: list[TreeRun] = []

    def follow(parent: TreeRun | None) -> None:
        key = parent.record.id if parent else None
        children = [_linked_run(found[one], names, parent, problems) for one in found if parents[one] == key]
        for child in sorted(children, key=lambda run: (run.begin.steps, run.name)):
            linked.append(child)
            follow(child)

    follow(None)
    return tuple(linked)


def _names(directories: Sequence[Path]) -> dict[Path, str]:
    """Short names: what the directories do not have in common."""
    places = {directory: directory.resolve() for directory in directories}
    common = os.path.commonpath([place.parent for place in places.values()]) if places else ""
    return {directory: os.path.relpath(place, common) for directory, place in places.items()}


def _linked_run(found: _Found, names: Mapping[Path, str], parent: TreeRun | None, problems: list[str]) -> TreeRun:
    origin, validation = found.record.origin, found.history["validation"]
    begin = _begin(origin, parent)
    loss, approximate = _loss_begin(origin, parent)
    name = names[found.directory]
    if origin and parent and origin.step > parent.end.steps:
        problems.append(
            f"{name} begins at step {origin.step:,} of {parent.name}, whose record ends at {parent.end.steps:,}"
        )
    return TreeRun(
        name=name,
        directory=found.directory,
        recipe=found.recipe,
        record=found.record,
        planned=steps_of(found.recipe),
        begin=begin,
        end=_end(found.history["train"], begin),
        evaluated=_last_of(validation),
        loss_begin=loss,
        loss_end=validation["loss"][-1] if validation["loss"] else None,
        approximate=approximate,
        history=found.history,
        parent=parent.record.id if parent else None,
        depth=parent.depth + 1 if parent else 0,
    )


def _begin(origin: Origin | None, parent: TreeRun | None) -> Spent:
    if origin is None:
        return Spent()
    seconds = origin.seconds
    if seconds is None:  # of a version that did not record it
        before = [value for step, value in _seconds(parent) if step <= origin.step]
        seconds = before[-1] if before else 0.0
    return Spent(origin.step, origin.tokens, origin.flops, seconds)


def _seconds(run: TreeRun | None) -> list[tuple[int, float]]:
    curve = run.history["train"] if run else {"steps": [], "seconds": []}
    return list(zip(curve["steps"], curve["seconds"], strict=True))


def _end(train: Mapping[str, Sequence[Any]], begin: Spent) -> Spent:
    """The last training step on record; where none is, the beginning."""
    if not train["steps"] or train["steps"][-1] < begin.steps:
        return begin
    return _last_of(train) or begin


def _last_of(curve: Mapping[str, Sequence[Any]]) -> Spent | None:
    """Where the last record of a curve stands; None if there is none."""
    return Spent(*(curve[name][-1] for name in ("steps", "tokens", "flops", "seconds"))) if curve["steps"] else None


def _loss_begin(origin: Origin | None, parent: TreeRun | None) -> tuple[float | None, bool]:
    """Validation loss at the branching point, and whether it is one from before it."""
    if origin is None or origin.validation_loss is not None:
        return (origin.validation_loss if origin else None), False
    if parent is None:
        return None, False
    curve = parent.history["validation"]
    before = [(step, loss) for step, loss in zip(curve["steps"], curve["loss"], strict=True) if step <= origin.step]
    return (before[-1][1], before[-1][0] < origin.step) if before else (None, False)
