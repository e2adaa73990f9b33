"""From cells to verdicts: pair, contrast, estimate, decide, and say what is missing.

A claim over seeds gets the t interval of its paired contrasts; a claim over items the clustered bootstrap of the items
that both arms measured. Under a sequential design a claim keeps the verdict of the look that decided it.

A claim with a failed or missing cell is inconclusive, whatever the other seeds say; the effect of the remaining pairs
is still shown. So is a claim whose gate is shut (`Gate`): what it is about has not happened yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchstone.errors import StudyError
from torchstone.lab.record import Outcome
from torchstone.lab.study import ZERO, Claim, Measurement, Study
from torchstone.report.result import Interval, Pair, Verdict
from torchstone.stats.bootstrap import clustered_estimate
from torchstone.stats.contrasts import Contrasts, paired_items, paired_seeds
from torchstone.stats.decision import decide
from torchstone.stats.estimate import Estimate, t_estimate
from torchstone.stats.power import minimum_detectable_effect, units_needed
from torchstone.stats.sequential import SequentialDesign, declared_looks

BOOTSTRAP_SEED = 7


@dataclass(frozen=True)
class Design:
    """How many seeds, and whether they may grow: declared before any cell runs."""

    looks: tuple[int, ...]
    sequential: SequentialDesign | None

    @classmethod
    def of(cls, seeds: int, max_seeds: int | None) -> Design:
        """A fixed design with `seeds`, or a sequential one from `seeds` to `max_seeds`.

        Raises:
            StudyError: fewer than one seed, or a maximum below the start.
        """
        if seeds < 1:
            raise StudyError(f"a study needs at least one seed; given {seeds}.")
        if max_seeds is None or max_seeds == seeds:
            return cls((seeds,), None)
        looks = declared_looks(seeds, max_seeds)
        return cls(looks, SequentialDesign(looks))

    def describe(self) -> str:
        """One paragraph for the report."""
        paired = (
            "Arms are paired by seed: the same data in the same order, and the same initial values where shapes allow."
        )
        if self.sequential is None:
            return f"{paired} {self.looks[0]} seeds, fixed beforehand; two-sided 95 % intervals."
        looks = ", ".join(map(str, self.looks))
        bounds = ", ".join(f"{bound:.2f}" for bound in self.sequential.boundaries)
        return (
            f"{paired} Seeds were added under a group-sequential rule declared beforehand: looks at {looks} seeds, "
            f"critical t values {bounds} (linear error spending). Intervals hold at all looks together with 95 %."
        )

    def estimate(self, contrasts: Contrasts) -> Estimate:
        """Effect and interval of contrasts over seeds."""
        if self.sequential is not None and contrasts.n in self.looks:
            return self.sequential.estimate(contrasts.values, resolution=contrasts.resolution)
        return t_estimate(contrasts.values, resolution=contrasts.resolution)


def effect_before(claim: Claim, design: Design) -> float | None:
    """Minimum detectable distance from the margin (80 % power) under the assumed spread; None if none was assumed."""
    if claim.assumed_sd is None or claim.unit != "seeds" or design.looks[-1] < 2:
        return None
    if design.sequential is not None:
        return design.sequential.minimum_detectable_effect(claim.assumed_sd)
    return minimum_detectable_effect(claim.assumed_sd, design.looks[-1])


def judge(
    study: Study,
    outcomes: Mapping[tuple[str, int], Outcome],
    design: Design,
    look: int,
    previous: Sequence[Verdict],
) -> list[Verdict]:
    """One verdict per claim at this look; claims decided at an earlier look keep theirs."""
    decided = {verdict.claim: verdict for verdict in previous if verdict.status != "inconclusive"}
    history = {verdict.claim: verdict.looks for verdict in previous}
    return [
        decided.get(claim.id) or _verdict(claim, outcomes, design, look, history.get(claim.id, ()))
        for claim in study.claims
    ]


def _verdict(
    claim: Claim,
    outcomes: Mapping[tuple[str, int], Outcome],
    design: Design,
    look: int,
    history: tuple[dict, ...],
) -> Verdict:
    seeds = range(design.looks[look])
    arm = _cells(claim.arm, outcomes, seeds)
    sides = {claim.arm: arm}
    if claim.baseline != ZERO:
        sides[claim.baseline] = _cells(claim.baseline, outcomes, seeds)
    baseline = sides.get(claim.baseline, {seed: _zeros(found) for seed, found in arm.items()})
    common = [seed for seed in seeds if seed in arm and seed in baseline]
    failures = _failures(sides, outcomes, seeds)
    shared: dict[str, Any] = {
        "claim": claim.id,
        "sentence": claim.sentence,
        "metric": claim.metric,
        "arm": claim.arm,
        "baseline": claim.baseline,
        "contrast": claim.contrast,
        "direction": claim.direction,
        "margin": claim.margin,
        "unit_of_n": claim.unit,
        "mde_before": effect_before(claim, design),
    }
    if not common:
        return Verdict(status="inconclusive", n=0, reason="; ".join(failures), **shared)
    contrasts = _contrasts(claim, {s: arm[s] for s in common}, {s: baseline[s] for s in common})
    estimate = _estimate(claim, contrasts, design)
    decision = decide(estimate, margin=claim.margin, direction=claim.direction)
    status, reason = decision.status, decision.reason
    if failures:
        status, reason = (
            "inconclusive",
            f"{len(failures)} cells failed, so the claim stays open: " + "; ".join(failures),
        )
    elif short := _below_gate(claim, outcomes, seeds):
        status, reason = "inconclusive", short
    record = {
        "n": estimate.n,
        "effect": estimate.effect,
        "low": estimate.low,
        "high": estimate.high,
        "status": status,
    }
    return Verdict(
        status=status,
        reason=reason,
        effect=estimate.effect,
        interval=_interval(estimate),
        n=estimate.n,
        mde_after=_detectable(estimate, design),
        n_needed=_needed(estimate, claim, status, design),
        pairs=_pairs(claim, contrasts),
        looks=(*history, record) if design.sequential is not None else (),
        **shared,
    )


def _below_gate(claim: Claim, outcomes: Mapping[tuple[str, int], Outcome], seeds: range) -> str:
    """Why the claim's gate is shut; empty if it is open or there is none."""
    gate = claim.gate
    if gate is None:
        return ""
    found = {seed: cell.metrics[gate.metric] for seed, cell in _cells(gate.arm, outcomes, seeds).items()}
    short = [seed for seed in seeds if seed not in found or found[seed] <= gate.least]
    if not short:
        return ""
    values = ", ".join(f"{found[seed]:.3g}" if seed in found else "missing" for seed in short)
    return (
        f"not judged: {gate.metric} of {gate.arm} has to be above {gate.least:g} in every seed, and is {values} "
        f"for seed{'s' * (len(short) > 1)} {', '.join(map(str, short))}"
    )


def _cells(arm: str, outcomes: Mapping[tuple[str, int], Outcome], seeds: range) -> dict[int, Measurement]:
    found = {seed: outcomes[arm, seed].measurement for seed in seeds if (arm, seed) in outcomes}
    return {seed: measurement for seed, measurement in found.items() if measurement is not None}


def _failures(
    sides: Mapping[str, Mapping[int, Measurement]], outcomes: Mapping[tuple[str, int], Outcome], seeds: range
) -> list[str]:
    """What is wrong with every cell that gave no measurement."""
    return [
        f"{name} seed {seed}: {outcomes[name, seed].error}"
        if (name, seed) in outcomes
        else f"{name} seed {seed} is missing"
        for name, found in sides.items()
        for seed in seeds
        if seed not in found
    ]


def _zeros(measurement: Measurement) -> Measurement:
    """The constant 0 in the shape of a measurement."""
    items = {metric: dict.fromkeys(values, 0.0) for metric, values in measurement.items.items()}
    return Measurement(dict.fromkeys(measurement.metrics, 0.0), items)


def _contrasts(claim: Claim, arm: Mapping[int, Measurement], baseline: Mapping[int, Measurement]) -> Contrasts:
    try:
        if claim.unit == "items":
            return paired_items(
                {seed: cell.items[claim.metric] for seed, cell in arm.items()},
                {seed: cell.items[claim.metric] for seed, cell in baseline.items()},
                claim.contrast,
            )
        return paired_seeds(
            {seed: cell.metrics[claim.metric] for seed, cell in arm.items()},
            {seed: cell.metrics[claim.metric] for seed, cell in baseline.items()},
            claim.contrast,
        )
    except KeyError as error:
        raise StudyError(f"claim {claim.id!r} needs the metric {error}, which a cell does not have.") from error


def _estimate(claim: Claim, contrasts: Contrasts, design: Design) -> Estimate:
    if claim.unit == "items":
        generator = np.random.default_rng(BOOTSTRAP_SEED)
        return clustered_estimate(
            contrasts.values,
            contrasts.clusters,
            generator,
            margin=claim.margin,
            resolution=contrasts.resolution,
        )
    return design.estimate(contrasts)


def _interval(estimate: Estimate) -> Interval | None:
    if estimate.low is None or estimate.high is None:
        return None
    return Interval(low=estimate.low, high=estimate.high, level=estimate.level)


def _detectable(estimate: Estimate, design: Design) -> float | None:
    """Minimum detectable distance from the margin under the observed spread and this design."""
    if estimate.sd is None or estimate.n < 2:
        return None
    if design.sequential is not None:
        return design.sequential.minimum_detectable_effect(estimate.sd)
    return minimum_detectable_effect(estimate.sd, estimate.n)


def _needed(estimate: Estimate, claim: Claim, status: str, design: Design) -> int | None:
    """Units of a fixed design that would decide, if effect and spread stay as observed; only for an inconclusive claim."""
    if status != "inconclusive" or not estimate.sd or design.sequential is not None:
        return None
    return units_needed(estimate.effect - claim.margin, estimate.sd)


def _pairs(claim: Claim, contrasts: Contrasts) -> tuple[Pair, ...]:
    """Every pair over seeds; items can be thousands and stay in the cells' records."""
    if claim.unit == "items":
        return ()
    columns = zip(contrasts.units, contrasts.baseline, contrasts.arm, contrasts.values, strict=True)
    return tuple(Pair(unit=unit, baseline=b, arm=a, contrast=c) for unit, b, a, c in columns)
