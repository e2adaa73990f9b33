"""A run directory made of a checkpoint of another run: what branching and growing share.

    PARENT/checkpoints/step-S  →  DIR/recipe.yaml
                                      run.json             a record of its own, with `origin`: where it comes from
                                      checkpoints/step-S   the position goes on: step, tokens, FLOPs, order of the data

The parent is only read. DIR appears whole or not at all. The child keeps the parent's precision and compilation, since another
choice would be another computation.

Pitfall: steps, tokens, FLOPs and seconds of the child go on from the parent's, so that what the child itself has cost is a
difference (`train.tree`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from torchstone.errors import CheckpointError, ConfigError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.storage import atomic
from torchstone.train.budget import counts_of, data_of
from torchstone.train.checkpoint import CheckpointStore, Snapshot
from torchstone.train.loop import Position
from torchstone.train.names import RECIPE, RECORD, require_outside, require_run
from torchstone.train.precision import Choice, Compute
from torchstone.train.record import Lineage, Origin, RunRecord, new_record, read_record, write_record
from torchstone.train.reference import Bound, Reference, open_reference

_FOLDER = re.compile(r"step-(\d{8,18})")
_AT = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class Parent:
    """A run at one of its checkpoints."""

    directory: Path
    recipe: Recipe
    record: RunRecord
    snapshot: Snapshot
    position: Position

    @property
    def step(self) -> int:
        """Updates done."""
        return self.snapshot.step


@dataclass(frozen=True)
class State:
    """What a child starts with: tensors by group, the optimizer's plain data, the position."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    optimizer: Mapping[str, Any]
    position: Position


def find_checkpoint(checkpoint: str | Path) -> tuple[Path, int | None]:
    """Run directory and step (None: the newest) of `RUN`, `RUN@STEP` or `RUN/checkpoints/step-00000100`.

    Raises:
        ConfigError: it is none of these.
    """
    path = Path(checkpoint)
    at, folder = _AT.fullmatch(str(checkpoint)), _FOLDER.fullmatch(path.name)
    if (path / RECIPE).is_file():
        return path, None
    if folder and (path.parent.parent / RECIPE).is_file():
        return path.parent.parent, int(folder[1])
    if at and (Path(at[1]) / RECIPE).is_file():
        return Path(at[1]), int(at[2])
    forms = "the directory that `torchstone train` wrote, RUN@STEP for an older checkpoint, or RUN/checkpoints/step-00000100"
    raise ConfigError(f"{checkpoint} holds no run (no {RECIPE}); give {forms}.")


def is_place_of(checkpoint: str | Path, directory: Path, step: int) -> bool:
    """Whether a name as in `find_checkpoint` is of that directory, whatever is there now, and of that step if it names one."""
    path = Path(checkpoint)
    at, folder = _AT.fullmatch(str(checkpoint)), _FOLDER.fullmatch(path.name)
    named: list[tuple[Path, int | None]] = [(path, None)]
    named += [(path.parent.parent, int(folder[1]))] if folder else []
    named += [(Path(at[1]), int(at[2]))] if at else []
    return any(place.resolve() == directory.resolve() and asked in (None, step) for place, asked in named)


def open_parent(directory: Path, step: int | None) -> Parent:
    """A run at a checkpoint, verified.

    Args:
        directory: of the run.
        step: which checkpoint; None takes the newest.

    Raises:
        ConfigError: the directory holds no run. CheckpointError: its record or the checkpoint is missing or damaged, or lacks
            what training needs.
    """
    require_run(directory)
    recipe, record = load_recipe(directory / RECIPE), read_record(directory)
    snapshot = CheckpointStore(directory / "checkpoints").load(step)
    if "model" not in snapshot.tensors or not {"optimizer", "position"} <= snapshot.data.keys():
        raise CheckpointError(
            f"step {snapshot.step} of {directory} is intact but no training checkpoint (it lacks the model, the optimizer or "
            "the position); give a run that `torchstone train` wrote."
        )
    position = Position.restored(snapshot.data["position"], counts_of(recipe))
    return Parent(directory, recipe, record, snapshot, position)


def data_with_reference(recipe: Recipe, bound: Bound | None) -> tuple[Any, Reference | None, str]:
    """The data source of a recipe, the reference model of its objective if it has one, and the fingerprint of both.

    `bound` is the checkpoint of the reference that the parent is bound to.
    """
    data = data_of(recipe)
    reference = open_reference(recipe, data, bound)
    return data, reference, reference.with_data(data.fingerprint) if reference else data.fingerprint


def check_free(directory: Path, what: str) -> None:
    """Raise ConfigError unless a child (`what`: "a branch") may be written there."""
    if directory.is_symlink():
        raise ConfigError(
            f"{directory} is a symbolic link, and {what} needs a place where a directory can appear; give as --out where the "
            f"link leads ({directory.resolve()}), or another name."
        )
    require_outside(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is in use; {what} starts in a directory of its own, choose another --out.")


def origin_of(
    parent: Parent, directory: Path, kind: Lineage, loss: float | None, changes: Sequence[str], taints: Sequence[str]
) -> Origin:
    """Where a child in `directory` comes from; taints of the parent stay with it."""
    place = os.path.relpath(parent.directory.resolve(), directory.resolve())
    position = parent.position
    kept = tuple(dict.fromkeys((*parent.record.taints, *taints)))
    return Origin(
        kind,
        parent.record.id,
        place,
        parent.step,
        position.tokens,
        position.flops,
        position.seconds,
        loss,
        tuple(changes),
        kept,
    )


def write_child(
    directory: Path,
    recipe: Recipe,
    data: str,
    parent: Parent,
    origin: Origin,
    state: State,
    environment: dict[str, Any],
    reference: Reference | None = None,
    extra: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the run directory of a child, whole or not at all.

    Args:
        directory: of the child; free (`check_free`).
        recipe, data: of the child: complete recipe, fingerprint of its data (and its objective's reference).
        parent, origin: where it comes from.
        state: what it starts with.
        environment: that the child will train in, see `training_environment`.
        reference: model of the child's objective.
        extra: writes further files into the folder.

    Raises:
        ConfigError: another process has made the directory meanwhile.
    """
    _sweep(directory)
    before = parent.record
    choice = Choice(Compute(**before.compute), before.measured)
    record = new_record(recipe, data, environment, choice, origin, reference)
    plain = {
        "position": asdict(state.position),
        "optimizer": state.optimizer,
        "fingerprint": record.fingerprint,
        "data": record.data,
        "environment": environment,
    }
    try:
        if directory.exists():
            directory.rmdir()
        with atomic.atomic_directory(directory) as folder:
            write_record(folder, recipe, record)
            snapshot = Snapshot(parent.step, state.tensors, plain)
            CheckpointStore(folder / "checkpoints", recipe.checkpoint.keep).save(snapshot)
            extra(folder)
    except OSError as error:
        if not (directory / RECORD).is_file():
            raise
        raise ConfigError(
            f"another process has made {directory} meanwhile; let that one train, or choose another --out."
        ) from error


def _sweep(directory: Path) -> None:
    """Remove partial folders of `directory` that killed processes left beside it."""
    for item in directory.parent.glob(f"{_literal(directory.name)}{atomic.PARTIAL}*"):
        if not atomic.partial_owner_lives(item.name):
            shutil.rmtree(item, ignore_errors=True)


def _literal(name: str) -> str:
    """`name` as a glob pattern that matches only itself."""
    return re.sub(r"([*?[])", r"[\1]", name)
