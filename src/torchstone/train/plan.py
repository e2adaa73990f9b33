"""Plan: what a recipe will do, before it runs: phases of its schedule, their cost, and the checkpoints that serve a budget.

A phase is a stage of the schedule with its steps, tokens, FLOPs, rates and, with `data_phases`, shares of the sources. A served
budget is a number of updates after which the schedule has decayed (`Schedule.checkpoints`), with what lies behind that state:
updates of warmup, plateau and decay, and those of earlier decays, which a run by WSD would have thrown away. At the same total
cost, WSD has `step − earlier decays` updates behind its checkpoint.

    plan = plan_of(load_recipe("recipes/tiny.yaml", ["schedule={kind: wsd-s, cycles: [750, 1500]}", "budget.steps=3000"]))
    plan.phases, plan.served, plan.schedule.plot("plan.svg")

Rates are multiples of the recipe's peak. Nothing is trained, and no data is read but what the vocabulary's size needs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchstone.errors import ConfigError
from torchstone.optim.schedules.base import Schedule
from torchstone.recipe.schema import Recipe
from torchstone.storage.atomic import atomic_write
from torchstone.train.budget import counts_of, phases_of, steps_of, tokens_per_step


@dataclass(frozen=True)
class PlannedPhase:
    """Steps `begin` … `end`-1 of one stage.

    Attributes:
        tokens, flops, share: of the phase, and its part of the whole run's.
        first, last: rates of its first and last step as multiples of the peak.
        sources: shares of the mixture's sources; empty without `data_phases`.
    """

    stage: str
    begin: int
    end: int
    tokens: int
    flops: float
    share: float
    first: float
    last: float
    sources: tuple[float, ...]


@dataclass(frozen=True)
class ServedBudget:
    """The state after `step` updates.

    Attributes:
        tokens, flops: spent until then.
        warmup, stable, decay: updates of each kind behind it, all cycles together.
        earlier_decays: those of `decay` that came before the last cycle.
    """

    step: int
    tokens: int
    flops: float
    warmup: int
    stable: int
    decay: int
    earlier_decays: int


@dataclass(frozen=True)
class RunPlan:
    """A recipe's phases and served budgets; see the module."""

    kind: str
    schedule: Schedule
    steps: int
    tokens: int
    flops: float
    phases: tuple[PlannedPhase, ...]
    served: tuple[ServedBudget, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, `schedule` as its plan."""
        return {
            "kind": self.kind,
            "peak": self.schedule.peak,
            "schedule": self.schedule.state_dict(),
            "steps": self.steps,
            "tokens": self.tokens,
            "flops": self.flops,
            "phases": [asdict(phase) for phase in self.phases],
            "served": [asdict(budget) for budget in self.served],
        }

    def write(self, directory: Path) -> tuple[Path, Path]:
        """`plan.json` and `plan.svg` in a directory, which is made if it is not there; returns their paths.

        Raises:
            ConfigError: there is something else in its place.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be a directory ({error.strerror}); give another one.") from error
        atomic_write(directory / "plan.json", json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n")
        return directory / "plan.json", self.schedule.plot(directory / "plan.svg", f"Schedule {self.kind}")


def plan_of(recipe: Recipe) -> RunPlan:
    """The plan of a recipe.

    Raises:
        ConfigError: the schedule does not fit the run, or `data_phases` not the schedule.
        BudgetError: the budget buys no step.
    """
    steps, per_step = steps_of(recipe), tokens_per_step(recipe)
    cost = counts_of(recipe).training_flops_per_token
    settings: Any = recipe.schedule
    schedule: Schedule = settings.build(steps, peak=getattr(recipe.optimizer, "learning_rate", None))
    shares = {phase.begin: phase.shares for phase in phases_of(recipe)}
    phases = tuple(
        PlannedPhase(
            stage.name,
            stage.begin,
            stage.end,
            (stage.end - stage.begin) * per_step,
            (stage.end - stage.begin) * per_step * cost,
            (stage.end - stage.begin) / steps,
            schedule.factor(stage.begin),
            schedule.factor(stage.end - 1),
            shares.get(stage.begin, ()),
        )
        for stage in schedule.stages()
    )
    served = _served(schedule, per_step, cost)
    return RunPlan(recipe.schedule.kind, schedule, steps, steps * per_step, steps * per_step * cost, phases, served)


def _served(schedule: Schedule, per_step: int, cost: float) -> tuple[ServedBudget, ...]:
    """In one pass over the stages, which may be very many."""
    behind = dict.fromkeys(("warmup", "stable", "decay"), 0)
    stages = iter(schedule.stages())
    stage, counted = next(stages, None), 0
    found: list[ServedBudget] = []
    for step in schedule.checkpoints():
        earlier = behind["decay"]
        while stage is not None and counted < step:
            until = min(stage.end, step)
            behind[stage.name] = behind.get(stage.name, 0) + until - counted
            counted = until
            stage = next(stages, None) if until == stage.end else stage
        kinds = {name: behind[name] for name in ("warmup", "stable", "decay")}
        found.append(ServedBudget(step, step * per_step, step * per_step * cost, **kinds, earlier_decays=earlier))
    return tuple(found)
