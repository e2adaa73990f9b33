"""Study, arm, claim, cell, measurement: the words of an experiment, as small frozen objects.

A study declares claims, arms and scales, and knows how to measure one cell (arm × seed). Everything else (seeds,
pairing, matching, caching, resume, executors, statistics, report) is the runner's work, see `torchstone.lab.runner`.

A claim is fixed before numbers exist: its metric, contrast, direction and margin are part of the study's fingerprint.

Pitfall: `measure` runs in another process. It may use only what the cell holds; state kept on the study is lost.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torchstone.errors import StudyError
from torchstone.report.result import ArmRecord, Figure, Metric, PaperFigure, Series, Table

ZERO = "zero"  # baseline of a claim about an arm's own number: it is contrasted with 0


@dataclass(frozen=True)
class Gate:
    """What must have happened for a claim to be judged: in every seed, the metric of an arm is above a least value.

    A task that appears as a phase transition says nothing of arms that were stopped before it. Where any seed is below, the claim
    stays inconclusive, whatever the contrast; leaving out those seeds would keep the ones that went well.
    """

    metric: str
    arm: str
    least: float


@dataclass(frozen=True)
class Claim:
    """A sentence that numbers can decide.

    Attributes:
        id: short identifier, unique in the study.
        sentence: the claim in plain words.
        metric: name of the metric that decides.
        arm, baseline: names of the two arms that are contrasted. The baseline `ZERO` contrasts the arm's own number with 0
            (a slope, a correlation, a difference that the metric itself takes).
        contrast: `difference` (arm - baseline) or `log ratio` (ln arm/baseline).
        direction: `less` if the claim is that the contrast lies below the margin, else `greater`.
        margin: the smallest effect worth claiming, in the contrast's unit, signed.
        unit: what is resampled: `seeds` (t interval) or `items` (clustered bootstrap over the cells' items).
        assumed_sd: standard deviation of the paired contrast that the design assumed, for the minimum detectable
            effect before the run; None if nothing is known.
        gate: what must have happened for the claim to be judged at all; None judges it whatever happened.
    """

    id: str
    sentence: str
    metric: str
    arm: str
    baseline: str
    contrast: Literal["difference", "log ratio"] = "difference"
    direction: Literal["greater", "less"] = "less"
    margin: float = 0.0
    unit: Literal["seeds", "items"] = "seeds"
    assumed_sd: float | None = None
    gate: Gate | None = None


@dataclass(frozen=True)
class Scale:
    """One size at which a study can run: how many seeds, and the settings that its arms read."""

    seeds: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A named variant. `settings` is plain JSON-able data: all that `measure` needs to know of the arm."""

    name: str
    role: Literal["baseline", "arm", "control"] = "arm"
    note: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One arm with one seed.

    Attributes:
        settings: the scale's settings.
        prepared: what `Study.prepare` returned, once for all cells.
        directory: the cell's own folder; may be written freely.
        report: call it with plain data (`step`, `steps`, `loss`) to show progress.
    """

    arm: Arm
    seed: int
    scale: str
    settings: Mapping[str, Any]
    directory: Path
    prepared: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[Mapping[str, Any]], None] = lambda progress: None


@dataclass(frozen=True)
class Measurement:
    """What a cell yields.

    Attributes:
        metrics: metric name → finite number.
        items: metric name → item id → number, for claims whose unit is `items`.
        series: curve name → series.
        extra: JSON-able data for `summarise`.
        tokens, flops, peak_bytes: cost, where it is known.
    """

    metrics: Mapping[str, float]
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    flops: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Summary:
    """What a study adds to the report beyond verdicts, made from all measurements."""

    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    paper: tuple[PaperFigure, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What one cell needs.

    Attributes:
        threads: intra-op threads.
        devices: CUDA devices to spread cells over; empty on a CPU.
    """

    threads: int = 1
    devices: tuple[str, ...] = ()


class Study(ABC):
    """Base of all studies. A subclass sets the class attributes and defines `arms` and `measure`."""

    slug: ClassVar[str | None] = None
    title: str
    question: str
    baseline: str
    metrics: tuple[Metric, ...]
    claims: tuple[Claim, ...]
    paper: tuple[PaperFigure, ...] = ()
    scales: Mapping[str, Scale]

    @abstractmethod
    def arms(self, scale: Scale) -> Sequence[Arm]:
        """The arms at this scale, the baseline among them."""

    def prepare(self, arms: Sequence[Arm], settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
        """Work to do once before any cell, in a worker process (build data, pin the precision). JSON-able."""
        return {}

    @abstractmethod
    def measure(self, cell: Cell) -> Measurement:
        """Run one cell and return its numbers. Called in a worker process."""

    def summarise(self, cells: Sequence[tuple[Cell, Measurement]]) -> Summary:
        """Tables, figures and notes from all finished cells. Nothing by default."""
        return Summary(paper=self.paper)

    def arm_record(self, arm: Arm) -> ArmRecord:
        """What the report says of an arm."""
        return ArmRecord(name=arm.name, role=arm.role, note=arm.note)

    def notes(self) -> tuple[str, ...]:
        """Small print that holds whatever the numbers are."""
        return ()

    def recipe_yaml(self, arms: Sequence[Arm]) -> str:
        """The baseline's recipe as YAML, where there is one."""
        return ""

    def resources(self, arms: Sequence[Arm]) -> Resources:
        """What one cell needs: one thread unless the study says otherwise."""
        return Resources()

    def command(self, scale: str, seeds: int | None, max_seeds: int | None) -> str:
        """The command that runs this study again as it was run."""
        more = f" --seeds {seeds}" if seeds is not None else ""
        more += f" --until-decided --max-seeds {max_seeds}" if max_seeds is not None else ""
        return f"torchstone study run {self.slug} --scale {scale}{more}"

    def reference(self) -> dict[str, Any]:
        """Plain data from which a worker process makes this study again (see `torchstone.lab.catalogue`)."""
        return {"slug": self.slug}

    def identity(self) -> dict[str, Any]:
        """What the fingerprint of the study covers beside arms and scale: its claims and its own source."""
        return {"claims": [asdict(claim) for claim in self.claims], "source": inspect.getsource(type(self))}

    def check(self, scale: Scale) -> list[Arm]:
        """The arms at `scale`, after checking names and claims against each other; raises StudyError."""
        from torchstone.storage.names import validate_name

        arms = list(self.arms(scale))
        names = [validate_name(arm.name, what="arm name") for arm in arms]
        if len(set(names)) != len(names):
            raise StudyError(f"arm names must differ; given: {', '.join(names)}. Name arms with NAME:key=value.")
        if self.baseline not in names:
            raise StudyError(f"baseline {self.baseline!r} is not among the arms: {', '.join(names)}.")
        if ZERO in names:
            raise StudyError(f"no arm may be called {ZERO!r}: claims use that name for the constant 0.")
        metrics = {metric.name for metric in self.metrics}
        for claim in self.claims:
            gate = claim.gate
            if gate is not None and (gate.arm not in names or gate.metric not in metrics):
                raise StudyError(
                    f"claim {claim.id!r} waits for {gate.metric} of {gate.arm}, which this study does not have."
                )
            if claim.baseline == ZERO and claim.contrast != "difference":
                raise StudyError(
                    f"claim {claim.id!r} contrasts with 0, which has no ratio; use the contrast 'difference'."
                )
            missing = {claim.arm, claim.baseline} - {*names, ZERO}
            if missing or claim.metric not in metrics:
                raise StudyError(
                    f"claim {claim.id!r} speaks of {', '.join(sorted(missing)) or claim.metric}, which this study does "
                    f"not have; arms: {', '.join(names)}; metrics: {', '.join(sorted(metrics))}."
                )
        json.dumps([dict(arm.settings) for arm in arms])
        return arms
