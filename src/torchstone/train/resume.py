"""Whether a run may continue: what changed since it was started, and what that means.

recipe   what decides the computation so far (model, data, objective, batch, seed, …) must be equal; what only decides
         what comes (budget, schedule, evaluation, checkpoint, sinks) may change and is recorded; the learning rate and other
         optimizer settings may change if named in `allow`
data     the fingerprint must be equal, unless `allow` names `data`, which taints the run
machine  thread count, world size, torch build: differences are printed and recorded; the run continues order-exact,
         not bitwise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchstone.errors import ConfigError, DataError
from torchstone.recipe.diff import Difference, differences
from torchstone.recipe.schema import Recipe
from torchstone.train.distributed import World

FREE = ("budget", "schedule", "evaluation", "checkpoint", "sinks")
NAMED = ("optimizer", "data")


@dataclass(frozen=True)
class Changes:
    """What differs from the run as it was started, in words."""

    recipe: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line each."""
        lines = [f"changed since the run was started: {change}" for change in self.recipe]
        if self.environment:
            lines.append(
                f"the environment differs ({'; '.join(self.environment)}): the run continues with the same data order, but not bitwise"
            )
        return lines + list(self.taints)


def training_environment(world: World) -> dict[str, Any]:
    """What bitwise equality depends on."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "world": world.size,
    }


def check_changes(
    before: Recipe,
    after: Recipe,
    data: tuple[str, str],
    environment: tuple[Mapping[str, Any], Mapping[str, Any]],
    allow: Sequence[str],
) -> Changes:
    """Compare the run as started with the run as asked for.

    Args:
        before, after: recipes.
        data: fingerprints before and after.
        environment: `training_environment` before and after.
        allow: names of sections (`optimizer`, `data`) whose change is accepted.

    Raises:
        ConfigError: a change that would make it another run. DataError: the data changed.
    """
    if unknown := set(allow) - set(NAMED):
        raise ConfigError(
            f"cannot allow changes of {', '.join(sorted(unknown))}; allowed: {', '.join(NAMED)}."
        )
    found = differences(before, after)
    refused = [
        change
        for change in found
        if _section(change) not in (*FREE, *allow) or change.path == "optimizer.kind"
    ]
    if refused:
        raise ConfigError(
            f"the run was started with another recipe: {'; '.join(map(_words, refused))}. Train into another directory, or restore these "
            f"values{_hint(refused)}."
        )
    taints = []
    if data[0] != data[1]:
        if "data" not in allow:
            raise DataError(
                f"the data changed since the run was started: its fingerprint was {data[0]}, now it is {data[1]}. Restore the files, "
                "train into another directory, or continue with --allow data (recorded as a taint)."
            )
        taints.append(f"the data changed within the run, from fingerprint {data[0]} to {data[1]}")
    old, new = environment
    moved = [f"{name}: {old.get(name)} → {new[name]}" for name in new if old.get(name) != new[name]]
    return Changes(tuple(map(_words, found)), tuple(moved), tuple(taints))


def _section(change: Difference) -> str:
    return change.path.split(".")[0]


def _words(change: Difference) -> str:
    return f"{change.path} was {change.before!r}, now {change.after!r}"


def _hint(refused: Sequence[Difference]) -> str:
    named = sorted({_section(change) for change in refused} & set(NAMED))
    return f", or accept them with --allow {' --allow '.join(named)}" if named else ""
