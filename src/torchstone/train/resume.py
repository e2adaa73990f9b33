"""Whether a run may continue: what changed since it was started, and what that means.

recipe   what decides the computation so far (model, data, objective, batch, seed, …) must be equal; what only
         decides what comes (budget, schedule, evaluation, checkpoint, sinks) may change and is recorded; settings
         of the optimizer may change if named in `allow`; batch.micro only changes rounding, and is reported so
rates    a schedule or budget that would have given another learning rate to a step that is done is another plan: refused,
         unless `allow` names `schedule`, which is recorded. A branch (`train.branch`) is the way to another plan
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
from torchstone.optim.schedules.base import ScheduleConfig
from torchstone.recipe.diff import Difference, differences
from torchstone.recipe.fingerprint import code_fingerprint, torch_version
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import steps_of
from torchstone.train.distributed import World

FREE = ("budget", "schedule", "evaluation", "checkpoint", "sinks")
NAMED = ("optimizer", "data", "schedule")
ROUNDING = "batch.micro"
MOST_ENDS = 40


@dataclass(frozen=True)
class Changes:
    """What differs from the run as it was started, in words.

    Attributes:
        recipe: settings. rates: what another schedule would have given to steps that are done, where that was accepted.
        environment: what bitwise equality depends on. taints: what makes the run less than clean.
    """

    recipe: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    taints: tuple[str, ...] = ()
    rates: tuple[str, ...] = ()

    def lines(self, since: str = "since the run was started") -> list[str]:
        """One line each."""
        lines = [f"changed {since}: {change}" for change in (*self.recipe, *self.rates)]
        if self.environment:
            lines.append(
                f"the environment differs ({'; '.join(self.environment)}): the run continues order-exact, not bitwise "
                "(the same data in the same order, other rounding)"
            )
        return lines + list(self.taints)


@dataclass(frozen=True)
class Told:
    """How a comparison is told: with what, and what else could be done.

    Attributes:
        run: whose recipe and data bind. started: the same as the beginning of a sentence on how it was trained.
        going_on: what is asked for. elsewhere: another way to it.
    """

    run: str
    started: str
    going_on: str
    elsewhere: str


RESUMED = Told("this run", "the run was started", "a resume", "train into another directory")
BRANCHED = Told("the parent", "the parent was trained", "a branch", "train a new run, without --branch")


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
    done: range = range(0),
    told: Told = RESUMED,
) -> Changes:
    """Compare the run as started with the run as asked for.

    Args:
        before, after: recipes.
        data: fingerprints before and after.
        environment: `training_environment` before and after.
        allow: names of sections (`optimizer`, `data`, `schedule`) whose change is accepted.
        done: steps whose learning rates must stay what they were; none for a branch.
        told: how a refusal is worded.

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
            f"{told.started} with another recipe: {'; '.join(map(_words, refused))}. Restore these values, or "
            f"{told.elsewhere}{_hint(refused)}."
        )
    rates = _other_rate(before, after, done)
    if rates and "schedule" not in allow:
        raise ConfigError(f"{told.started} under another plan: {rates}. {_ways_out(before, after)}")
    taints = []
    if data[0] != data[1]:
        if "data" not in allow:
            raise DataError(
                f"the data changed since {told.started}: its fingerprint was {data[0]}, now it is {data[1]}. Restore the files, "
                f"{told.elsewhere}, or continue with --allow data (recorded as a taint)."
            )
        taints.append(f"the data changed within the run, from fingerprint {data[0]} to {data[1]}")
    moved = [_words(change) for change in found if change.path == ROUNDING]
    old, new = environment
    moved += [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    changed = [_words(change) for change in found if change.path != ROUNDING]
    return Changes(tuple(changed), tuple(moved), tuple(taints), (rates,) if rates else ())


def _other_rate(before: Recipe, after: Recipe, done: range) -> str:
    """What another schedule or budget would have done to steps of `done`, in words; empty if nothing."""
    old, new = (recipe.schedule.build(steps_of(recipe)) for recipe in (before, after))
    step = old.first_change(new, done.stop, since=done.start)
    if step is None:
        return ""
    peaks = (getattr(recipe.optimizer, "learning_rate", None) for recipe in (before, after))
    was, now = (_rate(schedule.factor(step), peak) for schedule, peak in zip((old, new), peaks, strict=True))
    return f"step {step}, which is done, had the learning rate {was}, and this schedule and budget give it {now}"


def _rate(factor: float, peak: float | None) -> str:
    return f"{factor:.6g} of the peak" if peak is None else f"{factor * peak:.6g} ({factor:.6g} of the peak)"


def _ways_out(before: Recipe, after: Recipe) -> str:
    """What to do about rates that differ; where only the budget changed, fractions of the run are the likely reason."""
    fraction = ""
    if _in_cycles(before) and _in_cycles(after):
        fraction = _old_ends(before, after)
    elif before.schedule == after.schedule:
        stages = before.schedule.build(steps_of(before)).stages()
        lengths = ", ".join(f"{stage.name} {stage.end - stage.begin}" for stage in stages)
        fraction = (
            f" Stages that are fractions of the run move with the budget: give them in steps (they were: {lengths})."
        )
    return (
        "Restore schedule and budget; or start a branch, which leaves this run as it is: torchstone train … --branch RUN "
        f"--out OTHER; or accept it with --allow schedule (recorded).{fraction}"
    )


def _in_cycles(recipe: Recipe) -> bool:
    """Whether the recipe's schedule is cut into cycles."""
    return isinstance(recipe.schedule, ScheduleConfig) and recipe.schedule.in_cycles


def _old_ends(before: Recipe, after: Recipe) -> str:
    """How to name the ends that the cycles had, so that a longer run keeps them."""
    ends = before.schedule.build(steps_of(before)).checkpoints()
    settings: Any = after.schedule
    null = "schedule.cycle_length=null " if settings.cycle_length is not None else ""
    if len(ends) > MOST_ENDS:
        return f" The {len(ends):,} cycles ended elsewhere; the schedule of the run's recipe.yaml gives their ends."
    named = ",".join(map(str, ends))
    return (
        " Cycles that are given by their number or as fractions move with the budget: name the ends that they had, and the "
        f"later ones after them: {null}schedule.cycles=[{named}]."
    )


def _section(change: Difference) -> str:
    return change.path.split(".")[0]


def _allowed(change: Difference, allow: Sequence[str]) -> bool:
    if change.path == "optimizer.kind":
        return False
    return change.path == ROUNDING or _section(change) in (*FREE, *allow)


def _words(change: Difference) -> str:
    return f"{change.path} was {change.before!r}, now {change.after!r}"


def _hint(refused: Sequence[Difference]) -> str:
    """What `allow` could accept of it; another kind of optimizer takes its settings with it, so that these alone are no use."""
    kept = {"optimizer"} if any(change.path == "optimizer.kind" for change in refused) else set()
    named = sorted({_section(change) for change in refused} & set(NAMED) - kept)
    if not named:
        return ""
    whole = all(_section(change) in named for change in refused)
    which = "they" if whole else f"those of {' and '.join(named)}"
    return f"; {which} can be accepted with --allow {' --allow '.join(named)}"
