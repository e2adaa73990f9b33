"""`run.json` and `recipe.yaml`: what a run is, fixed at its start, and every resume under other circumstances.

id            names the run for dashboards
fingerprint   of the recipe, the code and the data at the start
data          fingerprint of the data now
environment   what bitwise equality depends on (`training_environment`), at the start
groups        what the optimizer decays how strongly, by name (`optim.groups.group_table`); empty where it says no decay,
              and in records of versions that did not list it
compute       precision and compilation, chosen once; `measured`: the times that led to it
resumes       one entry per resume: changes of the recipe, of the environment, and taints
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchstone.errors import CheckpointError, ConfigError
from torchstone.recipe.fingerprint import fingerprint
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.storage.atomic import atomic_write
from torchstone.train.budget import groups_of
from torchstone.train.distributed import World
from torchstone.train.precision import Choice, Compute
from torchstone.train.resume import Changes, check_changes, training_environment

RECORD, RECIPE = "run.json", "recipe.yaml"
KEYS = {"id", "fingerprint", "data", "environment", "groups", "compute", "measured", "resumes"}
OPTIONAL: dict[str, Any] = {"groups": []}  # keys that records of earlier versions lack, and what stands for them


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

    @property
    def taints(self) -> tuple[str, ...]:
        """What makes the run less than clean, each once, in order."""
        return tuple(dict.fromkeys(taint for resumed in self.resumes for taint in resumed["taints"]))


def read_record(directory: Path) -> RunRecord:
    """The record of a run directory; raises CheckpointError if it is damaged."""
    path = directory / RECORD
    try:
        record = {**OPTIONAL, **json.loads(path.read_bytes())}
        if set(record) != KEYS:
            raise ValueError(f"it should hold {', '.join(sorted(KEYS))}")
        Compute(**record["compute"])
        found = RunRecord(**record)
        _ = found.taints
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or train into another directory.") from error
    return found


def start_run(directory: Path, recipe: Recipe, data: str, world: World, choose: Callable[[], Choice]) -> RunRecord:
    """Write the record of a new run; the leading rank chooses precision and compilation and writes.

    Args:
        directory: of the run.
        recipe: complete recipe.
        data: fingerprint of its data.
        world: this process among its peers.
        choose: called on the leading rank.
    """
    if world.leads:
        choice = choose()
        record = RunRecord(
            id=secrets.token_hex(8),
            fingerprint=fingerprint(recipe, data=data),
            data=data,
            environment=training_environment(world),
            groups=groups_of(recipe),
            compute=choice.compute.data(),
            measured=choice.measured,
            resumes=[],
        )
        _write(directory, recipe, record)
    world.barrier()
    return read_record(directory)


def continue_run(
    directory: Path, recipe: Recipe, data: str, world: World, allow: Sequence[str]
) -> tuple[RunRecord, Changes]:
    """Check that a run may continue under this recipe, data and environment, and record what changed.

    Raises:
        ConfigError: the recipe is another one, or its decay puts parameters into other groups. DataError: the data
            changed. CheckpointError: the record is damaged.
    """
    before, started = read_record(directory), load_recipe(directory / RECIPE)
    environment = before.environment, training_environment(world)
    changes = check_changes(started, recipe, (before.data, data), environment, allow)
    groups = groups_of(recipe)
    _check_groups(before.groups or groups_of(started), groups)
    world.barrier()  # every rank has read before the leading one writes
    if world.leads:
        after = RunRecord(
            **{**asdict(before), "data": data, "groups": groups, "resumes": [*before.resumes, asdict(changes)]}
        )
        _write(directory, recipe, after)
    world.barrier()
    return read_record(directory), changes


def _check_groups(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError unless the groups hold the parameters that they held: moments are stored in their order."""
    if [group["names"] for group in before] != [group["names"] for group in after]:
        raise ConfigError(
            f"optimizer.weight_decay puts the parameters into the groups {_names(after)}, and the checkpoints of this run "
            f"hold the optimizer's state by the groups {_names(before)}: a resume with --allow optimizer may change numbers, "
            "but a role may neither get a number of its own nor lose it. Restore the roles that it names, or train into "
            "another directory."
        )


def _names(groups: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(group["group"] for group in groups) or "of one kind"


def _write(directory: Path, recipe: Recipe, record: RunRecord) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / RECIPE, dump_yaml(recipe))
    atomic_write(directory / RECORD, json.dumps(asdict(record), indent=1) + "\n")
