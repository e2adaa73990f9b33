"""How many steps of warmup a recipe needs: as long as its updates turn the weights further than they will later.

    advice = suggest_warmup("recipe.yaml")          # a short run without warmup, then forgotten
    advice = suggest_warmup(meter)                  # or records of a run that was measured
    advice.steps, advice.ratio, advice.describe()

The mean angle between the matrices before and after an update is compared with its steady value, the median over 50 …
80 % of the steps. Warmup is to last until the ratio stays below `threshold` (1.5). A warmup as long as this lowers
the rate where updates are larger than the run will have them anyway; whether that improves the final loss, a
comparison decides.

Pitfalls: the angle follows the rate, so records are used only while the rate is that of the first one: measure
without warmup. The angle keeps falling slowly while norms grow, so that a longer probe may name a few more steps.
Updates of fixed angle (`lionar`, `rotational`) need none by this measure, whatever their loss says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from torchstone.diagnose.updates.meter import UpdateMeter
from torchstone.diagnose.updates.series import LATE, Record, curve, early_late, read_updates
from torchstone.errors import ConfigError, DataError, NonFiniteError
from torchstone.recipe.load import load_recipe
from torchstone.recipe.schema import Recipe
from torchstone.train.budget import counts_of, data_of
from torchstone.train.distributed import World
from torchstone.train.loop import Trainer
from torchstone.train.precision import Compute, default_device

THRESHOLD = 1.5
PROBE_STEPS, FEWEST_STEPS, FEWEST_RECORDS = 200, 20, 8
SAME_RATE = 0.01  # relative difference up to which two rates are one


@dataclass(frozen=True)
class WarmupAdvice:
    """What the angles say.

    Attributes:
        steps: of warmup; 0 where no update is larger than `threshold` times the steady ones.
        ratio: median angle of the first five steps over the steady one.
        steady: the steady angle in radians.
        threshold: the ratio below which updates count as steady.
        looked_at: steps that the answer rests on.
        curve: step → angle over the steady one.
    """

    steps: int
    ratio: float
    steady: float
    threshold: float
    looked_at: int
    curve: Mapping[int, float]

    def describe(self) -> str:
        """One sentence."""
        need = f"a warmup of {self.steps} steps" if self.steps else "no warmup"
        return (
            f"The first updates turn the weights {self.ratio:.2g} times as far as later ones ({self.steady:.3g} rad); by this "
            f"measure {need} would do (ratio below {self.threshold:g} from then on, {self.looked_at} steps looked at). A "
            "comparison decides whether it lowers the loss."
        )


def suggest_warmup(
    source: UpdateMeter | Sequence[Record] | Recipe | str | Path | Mapping[str, Any],
    *,
    threshold: float = THRESHOLD,
    steps: int = PROBE_STEPS,
    device: torch.device | None = None,
) -> WarmupAdvice:
    """Steps until updates are no longer `threshold` times as large, as angles, as they will be.

    Args:
        source: a meter or its records; a run directory with `updates.jsonl`; or a recipe (object, YAML file or plain data), of
            which a run of `steps` steps without warmup is made in memory.
        threshold: ratio to the steady angle, above 1.
        steps: of the run that a recipe is probed with.
        device: of that run; None takes the first GPU, else the CPU.

    Raises:
        ConfigError: a threshold of 1 or less, too short a probe, or updates that do not settle within it. DataError: records that
            are too few, lack angles, or have no stretch of one rate at their start. NonFiniteError: the probe diverged.
    """
    if not threshold > 1:
        raise ConfigError(f"threshold is a ratio above 1 (1.5 is usual); given {threshold:g}.")
    if isinstance(source, UpdateMeter):
        return _advice(source.records, threshold)
    if isinstance(source, str | Path) and Path(source).is_dir():
        return _advice(read_updates(Path(source)), threshold)
    if isinstance(source, Recipe | str | Path | Mapping):
        return _advice(probe(load_recipe(source), steps, device), threshold)
    return _advice(source, threshold)


def probe(recipe: Recipe, steps: int, device: torch.device | None = None) -> list[dict[str, Any]]:
    """Records of the angles of every update of a short run of the recipe at its peak rate without warmup, in memory.

    Raises:
        ConfigError: fewer than 20 steps. NonFiniteError: loss or gradient is not finite.
    """
    if steps < FEWEST_STEPS:
        raise ConfigError(f"a probe takes at least {FEWEST_STEPS} steps, better {PROBE_STEPS}; given {steps}.")
    changes = [f"budget.steps={steps}", "schedule={kind: constant, warmup: 0}", "data_phases={}"]
    short = load_recipe(recipe, changes)
    data, counts = data_of(short), counts_of(short)
    place = World(0, 1, device or default_device())
    model = short.model.build(data.vocab_size, data.length, short.seed).to(place.device)
    compute = Compute("fp32" if short.precision == "auto" else short.precision, False)
    trainer = Trainer(short, model, data, compute, place, steps, counts)
    meter = UpdateMeter(model, trainer.optimizer, every=1, metrics=("angle",))
    model.train()
    try:
        while not trainer.finished:
            trainer.step()
    except NonFiniteError as error:
        raise NonFiniteError(
            f"the probe without warmup diverged at step {trainer.position.step}: {error}. Lower optimizer.learning_rate."
        ) from error
    finally:
        meter.close()
    return meter.records


def _advice(records: Sequence[Record], threshold: float) -> WarmupAdvice:
    used = _one_rate(records)
    steps, angles = curve(used, "angle")
    last = steps[-1] if steps else 0
    both = early_late(steps, angles, last)
    if len(steps) < FEWEST_RECORDS or last < FEWEST_STEPS or both is None or both.ratio is None:
        rate = f"; the rate changes after step {used[-1]['step']}" if 0 < len(used) < len(records) else ""
        raise DataError(
            f"{len(steps)} records of angles at the first rate, up to step {last}, are too few{rate}. At least "
            f"{FEWEST_RECORDS} up to step {FEWEST_STEPS} are needed, steps 1 to 5 among them: measure a run without warmup "
            "(schedule.warmup=0)."
        )
    ratios = {step: angle / both.late for step, angle in zip(steps, angles, strict=True)}
    before = [step for step in steps if step < LATE[0] * last]
    large = [step for step in before if ratios[step] >= threshold]
    if large and large[-1] == before[-1]:
        raise ConfigError(
            f"updates are still {ratios[large[-1]]:.2g} times as large at step {large[-1]} of {last} as the median later; look "
            f"at more steps, {2 * last} for example."
        )
    until = next(step for step in steps if step > large[-1]) - 1 if large else 0
    return WarmupAdvice(until, both.ratio, both.late, threshold, last, ratios)


def _one_rate(records: Sequence[Record]) -> list[Record]:
    """The records from the start on whose rate is that of the first."""
    if not records:
        return []
    first = records[0]["rate"]
    return list(takewhile(lambda record: abs(record["rate"] - first) <= SAME_RATE * first, records))
