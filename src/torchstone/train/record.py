"""`run.json` and `recipe.yaml`: what a run is, fixed at its start, and every resume under other circumstances.

id            names the run for dashboards
fingerprint   of the recipe, the code and the data at the start
data          fingerprint of the data now
environment   what bitwise equality depends on (`training_environment`), at the start
groups        what the optimizer decays how strongly, by name (`optim.groups.group_table`); empty where it says no decay,
              and in records of versions that did not list it
compute       precision and compilation, chosen once; `measured`: the times that led to it
resumes       one entry per resume: changes of the recipe, of rates of steps already done, of the environment, and taints
origin        of a branch or a grown run: the parent's id and directory (relative to this one), what the parent had done and spent
              at the branching point, the validation loss there, what the child changed, and the parent's taints; else null
rates_from    step from which the schedule of `recipe.yaml` gave the rates: 0, the branching point, or where a schedule that
              differs was accepted with `--allow schedule`
ends          updates after which a schedule or budget that held before had decayed or ended; their checkpoints are kept
reference     step and fingerprint of the checkpoint that the objective's reference model is from; null without one
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchstone.errors import CheckpointError, ConfigError
from torchstone.recipe.fingerprint import fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.storage.atomic import atomic_write
from torchstone.train.budget import groups_of, steps_of, tokens_per_step
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.distributed import World
from torchstone.train.names import GROWTH, RECIPE, RECORD
from torchstone.train.precision import Choice, Compute
from torchstone.train.reference import Bound, Reference
from torchstone.train.resume import RESUMED, Changes, Told, check_changes, training_environment

KEYS = {"id", "fingerprint", "data", "environment", "groups", "compute", "measured", "resumes", "origin", "rates_from"}
KEYS |= {"ends", "reference"}
# keys that records of earlier versions lack, and what stands for them
OPTIONAL: dict[str, Any] = {"groups": [], "origin": None, "rates_from": 0, "ends": [], "reference": None}
Lineage = Literal["branch", "growth"]


@dataclass(frozen=True)
class Origin:
    """The branching point of a run that goes on from a checkpoint of another one.

    Attributes:
        kind: how it was made.
        run, directory: the parent's id, and its directory relative to the child's ("" where it is not known).
        step, tokens, flops, seconds: what the parent had done and spent, its own ancestors included.
        validation_loss: there, by the child's settings of evaluation; None where it was not measured.
        changes: what the child's recipe changed, in words. taints: of the parent, and of the branching.
    """

    kind: Lineage
    run: str
    directory: str
    step: int
    tokens: int
    flops: float
    seconds: float | None = None
    validation_loss: float | None = None
    changes: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Origin:
        """From plain data; raises ValueError or TypeError if it is no origin."""
        found = cls(**{**stored, "changes": tuple(stored["changes"]), "taints": tuple(stored["taints"])})
        numbers = (found.step, found.tokens, found.flops, found.seconds or 0.0, found.validation_loss or 0.0)
        if found.kind not in ("branch", "growth") or not all(type(value) in (int, float) for value in numbers):
            raise ValueError("its origin is none that torchstone wrote")
        return found


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`."""

    id: str
    fingerprint: str
    data: str
    environment: dict[str, Any]
    groups: list[dict[str, Any]]
    compute: dict[str, Any]
    measured: dict[str, Any]
    resumes: list[dict[str, Any]]
    origin: Origin | None
    rates_from: int
    ends: tuple[int, ...] = ()
    reference: Bound | None = None

    @property
    def taints(self) -> tuple[str, ...]:
        """What makes the run less than clean, each once, in order."""
        inherited = self.origin.taints if self.origin else ()
        return tuple(dict.fromkeys([*inherited, *(taint for resumed in self.resumes for taint in resumed["taints"])]))


def read_record(directory: Path) -> RunRecord:
    """The record of a run directory; raises CheckpointError if it is damaged."""
    path = directory / RECORD
    try:
        stored = json.loads(path.read_bytes())
        record = {**OPTIONAL, **({} if "origin" in stored else _grown_before(directory)), **stored}
        if set(record) != KEYS or type(record["rates_from"]) is not int:
            raise ValueError(f"it should hold {', '.join(sorted(KEYS))}")
        if not all(type(step) is int for step in record["ends"]):
            raise ValueError("its ends are no steps")
        Compute(**record["compute"])
        read = {
            "origin": Origin.read(record["origin"]) if record["origin"] else None,
            "reference": Bound.read(record["reference"]) if record["reference"] else None,
            "ends": tuple(record["ends"]),
        }
        found = RunRecord(**{**record, **read})
        _ = found.taints
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or train into another directory.") from error
    return found


def _grown_before(directory: Path) -> dict[str, Any]:
    """What a grown run's record lacks if a version wrote it that kept the origin in `growth.json` alone."""
    if not (directory / GROWTH).is_file():
        return {}
    stored = json.loads((directory / GROWTH).read_bytes())["origin"]
    tokens = stored["step"] * tokens_per_step(load_recipe(directory / RECIPE))
    origin = Origin("growth", stored["run"], "", stored["step"], tokens, stored["training_flops"])
    return {"origin": asdict(origin), "rates_from": origin.step}


def new_record(
    recipe: Recipe,
    data: str,
    environment: dict[str, Any],
    choice: Choice,
    origin: Origin | None = None,
    reference: Reference | None = None,
) -> RunRecord:
    """The record of a run that begins, with an id of its own.

    Args:
        recipe: complete recipe.
        data: fingerprint of its data.
        environment: see `training_environment`.
        choice: precision and compilation.
        origin: where a branch or a grown run comes from.
        reference: model of its objective.
    """
    return RunRecord(
        id=secrets.token_hex(8),
        fingerprint=fingerprint(recipe, data=data),
        data=data,
        environment=environment,
        groups=groups_of(recipe),
        compute=choice.compute.data(),
        measured=choice.measured,
        resumes=[],
        origin=origin,
        rates_from=origin.step if origin else 0,
        reference=reference.bound if reference else None,
    )


def start_run(
    directory: Path,
    recipe: Recipe,
    data: str,
    world: World,
    choose: Callable[[], Choice],
    reference: Reference | None = None,
) -> RunRecord:
    """Write the record of a new run; the leading rank chooses precision and compilation and writes.

    Args:
        directory: of the run.
        recipe: complete recipe.
        data: fingerprint of its data.
        world: this process among its peers.
        choose: called on the leading rank.
        reference: model of its objective.
    """
    if world.leads:
        found = new_record(recipe, data, training_environment(world), choose(), reference=reference)
        write_record(directory, recipe, found)
    world.barrier()
    return read_record(directory)


def continue_run(
    directory: Path,
    recipe: Recipe,
    data: str,
    world: World,
    allow: Sequence[str],
    reference: Reference | None = None,
) -> tuple[RunRecord, Changes]:
    """Check that a run may continue under this recipe, data and environment, and record what changed.

    Raises:
        ConfigError: the recipe is another one, its schedule would have given steps already done other rates, or its decay puts
            parameters into other groups. DataError: the data changed. CheckpointError: the record is damaged.
    """
    before, started = read_record(directory), load_recipe(directory / RECIPE)
    environment = before.environment, training_environment(world)
    done = range(before.rates_from, CheckpointStore(directory / "checkpoints").latest() or 0)
    changes = check_changes(started, recipe, (before.data, data), environment, allow, done)
    groups = groups_of(recipe)
    check_groups(before.groups or groups_of(started), groups)
    world.barrier()  # every rank has read before the leading one writes
    if world.leads:
        after = replace(
            before,
            data=data,
            groups=groups,
            resumes=[*before.resumes, asdict(changes)],
            rates_from=done.stop if changes.rates else before.rates_from,
            ends=_ends(before, started, done.stop),
            reference=reference.bound if reference else None,
        )
        write_record(directory, recipe, after)
    world.barrier()
    return read_record(directory), changes


def _ends(before: RunRecord, started: Recipe, done: int) -> tuple[int, ...]:
    """Ends that earlier plans of a run have reached, that of `started` included."""
    reached = (step for step in started.schedule.build(steps_of(started)).checkpoints() if step <= done)
    return tuple(sorted({*before.ends, *reached}))


def check_groups(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], told: Told = RESUMED) -> None:
    """Raise ConfigError unless the groups hold the parameters that they held: moments are stored in their order."""
    if [group["names"] for group in before] != [group["names"] for group in after]:
        raise ConfigError(
            f"optimizer.weight_decay puts the parameters into the groups {_names(after)}, and the checkpoints of {told.run} "
            f"hold the optimizer's state by the groups {_names(before)}: {told.going_on} with --allow optimizer may change "
            f"numbers, but a role may neither get a number of its own nor lose it. Restore the roles that it names, "
            f"or {told.elsewhere}."
        )


def _names(groups: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(group["group"] for group in groups) or "of one kind"


def write_record(directory: Path, recipe: Recipe, record: RunRecord) -> None:
    """Write `recipe.yaml` and `run.json`, each all or nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / RECIPE, dump_yaml(recipe))
    atomic_write(directory / RECORD, json.dumps(asdict(record), indent=1) + "\n")
