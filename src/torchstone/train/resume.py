"""Whether a run may continue: what changed since it was started, and what that means.

recipe   what decides the computation so far (model, data, objective, batch, seed, …) must be equal; what only
         decides what comes (budget, schedule, evaluation, checkpoint, sinks) may change and is recorded; settings
         of the optimizer may change if named in `allow`; batch.micro only changes rounding, and is reported so
data     the fingerprint must be equal, unless `allow` names `data`, which taints the run
machine  thread count, world size, torch build, code: differences are printed and recorded; the run continues
         order-exact, not bitwise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchstone.errors import ConfigError, DataError
from torchstone.recipe.diff import Difference, differences
from torchstone.recipe.fingerprint import code_fingerprint, torch_version
from torchstone.recipe.schema import Recipe
from torchstone.train.distributed import World

FREE = ("budget", "schedule", "evaluation", "checkpoint", "sinks")
NAMED = ("optimizer", "data")
ROUNDING = "batch.micro"


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
                f"the environment differs ({'; '.join(self.environment)}): the run continues order-exact, not bitwise "
                "(the same data in the same order, other rounding)"
            )
        return lines + list(self.taints)


def training_environment(world: World) -> dict[str, Any]:
    """What bitwise equality depends on, beside the recipe and the data."""
    on_gpu = world.device.type == "cuda"
    return {
        "torch": torch_version(),
        "device": torch.cuda.get_device_name(world.device) if on_gpu else "cpu",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world": world.size,
        "code": code_fingerprint()[:12],
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
        listed = ", ".join(sorted(unknown))
        raise ConfigError(f"cannot allow changes of {listed}; what can be allowed is: {', '.join(NAMED)}.")
    found = differences(before, after)
    refused = [change for change in found if not _allowed(change, allow)]
    if refused:
        raise ConfigError(
            f"the run was started with another recipe: {'; '.join(map(_words, refused))}. Train into another "
            f"directory, or restore these values{_hint(refused)}."
        )
    taints = []
    if data[0] != data[1]:
        if "data" not in allow:
            raise DataError(
                f"the data changed since the run was started: its fingerprint was {data[0]}, now it is {data[1]}. "
                "Restore the files, train into another directory, or continue with --allow data (recorded as a "
                "taint)."
            )
        taints.append(f"the data changed within the run, from fingerprint {data[0]} to {data[1]}")
    moved = [_words(change) for change in found if change.path == ROUNDING]
    old, new = environment
    moved += [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    changed = [_words(change) for change in found if change.path != ROUNDING]
    return Changes(tuple(changed), tuple(moved), tuple(taints))


def _section(change: Difference) -> str:
    return change.path.split(".")[0]


def _allowed(change: Difference, allow: Sequence[str]) -> bool:
    if change.path == "optimizer.kind":
        return False
    return change.path == ROUNDING or _section(change) in (*FREE, *allow)


def _words(change: Difference) -> str:
    return f"{change.path} was {change.before!r}, now {change.after!r}"


def _hint(refused: Sequence[Difference]) -> str:
    mendable = [change for change in refused if change.path != "optimizer.kind"]
    named = sorted({_section(change) for change in mendable} & set(NAMED))
    return f", or accept them with --allow {' --allow '.join(named)}" if named else ""
