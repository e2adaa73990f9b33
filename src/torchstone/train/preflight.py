"""What is checked before the first step, so that a run does not fail for it hours later.

schedule     its stages fit the run, and those that `data_phases` names are there
memory       the estimate of a step's memory against what the device has (an estimate: only a clear excess is refused)
disk         room for the checkpoints that are kept and one more (`CheckpointStore.check_space`)
sinks        dashboards that are asked for are installed
tokens       ids that the objective looks for are those that the data writes
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torchstone.errors import ConfigError, DependencyError
from torchstone.models.counts import OPTIMIZER_VALUES, Counts, Precision, memory_estimate
from torchstone.nn.memory import device_bytes
from torchstone.objectives.next_token import LEAST_TOKENS
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import phases_of
from torchstone.train.checkpoint import CheckpointStore
from torchstone.train.distributed import World

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_run(recipe: Recipe, counts: Counts, world: World, store: CheckpointStore) -> None:
    """Raise a typed error if the run cannot go well on this machine.

    Raises:
        ConfigError: it needs clearly more memory than there is, ranks cannot share the batch, or the schedule does not fit.
        CheckpointError: the disk has no room for its checkpoints. DependencyError: a sink is not installed.
    """
    for sink in recipe.sinks:
        if find_spec(PACKAGES[sink]) is None:
            raise DependencyError(
                f"the sink {sink} needs a package: pip install 'torchstone[{sink}]', or remove it from sinks."
            )
    phases_of(recipe)
    start, stop = world.rows(recipe.batch.sequences)
    rows = min(recipe.batch.micro or stop - start, stop - start)
    check_memory(recipe, counts, rows, device_bytes(world.device), world.device.type)
    if world.leads:
        values = 1 + OPTIMIZER_VALUES.get(recipe.optimizer.kind, 2)
        store.check_space(4 * values * counts.parameters)


def check_tokens(recipe: Recipe, data: Any) -> None:
    """Raise ConfigError if the objective looks for other special tokens than those that the data writes.

    Args:
        recipe: complete recipe.
        data: its source; those that write special tokens have the ids as `fim_token` and `end_token`.
    """
    for name in ("fim_token", "end_token"):
        asked, written = getattr(recipe.objective, name, None), getattr(data, name, None)
        if asked is not None and written is not None and asked != written:
            raise ConfigError(
                f"objective.{name} is {asked}, and this data writes {written} there: the objective would score other tokens "
                f"than it says, or none; set objective.{name}={written}."
            )


def check_memory(recipe: Recipe, counts: Counts, rows: int, available: int, device: str) -> None:
    """Raise ConfigError if a step of `rows` sequences needs more than `available` bytes of a `device` by the estimate."""
    if recipe.optimizer.kind not in OPTIMIZER_VALUES:
        return  # of another package; its memory is not known
    precision: Precision = "fp32" if recipe.precision == "fp32" else "bf16"
    chunk = getattr(recipe.objective, "chunk", None) or max(1, LEAST_TOKENS // counts.components)
    needed = memory_estimate(counts, rows, precision, recipe.optimizer.kind, chunk, device)
    if needed.total > available:
        raise ConfigError(
            f"a training step of {rows} sequences needs about {needed.total / 1e9:.3g} GB (activations "
            f"{needed.activations / 1e9:.3g}, weights, gradients and moments "
            f"{(needed.parameters + needed.gradients + needed.optimizer) / 1e9:.3g}), and there are "
            f"{available / 1e9:.3g} GB; set batch.micro lower, or make the model smaller."
        )
