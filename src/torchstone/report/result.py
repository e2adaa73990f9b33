"""The result of a comparison or study, as data: what `result.json` holds and what every report shows.

Nothing here computes. Numbers that do not exist are null; non-finite numbers are refused, so that the file is valid
JSON everywhere. Schema changes raise `SCHEMA_VERSION`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
Status = Literal["holds", "fails", "inconclusive"]


class Record(BaseModel):
    """Base: frozen, strict, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Record):
    """Two-sided confidence interval at `level` (0.95 unless the design says otherwise)."""

    low: float
    high: float
    level: float


class Metric(Record):
    """A number that every cell yields. `better` says which direction a reader should like."""

    name: str
    label: str
    unit: str = ""
    better: Literal["lower", "higher", "neither"] = "lower"


class Change(Record):
    """One line of an intervention: the dotted recipe path, its value in the baseline and in the arm."""

    path: str
    baseline: Any = None
    value: Any = None


class Match(Record):
    """How an arm was matched to the baseline: the quantity, the free dimension that was solved for, the residual."""

    on: Literal["params", "flops"]
    free: str
    before: Any = None
    after: Any = None
    target: float
    achieved: float
    residual: float = Field(description="achieved / target - 1")
    tolerance: float


class ArmRecord(Record):
    """One arm as it was run."""

    name: str
    role: Literal["baseline", "arm", "control"] = "arm"
    note: str = ""
    intervention: tuple[Change, ...] = ()
    parameters: int | None = None
    active_parameters: int | None = Field(
        default=None, description="those that one token uses, where experts are chosen"
    )
    flops_per_token: float | None = None
    match: Match | None = None
    learning_rate: float | None = None
    learning_rate_policy: Literal["tuned", "shared", "none"] = "none"


class Series(Record):
    """A curve of one cell. `axes` maps an axis name (`steps`, `tokens`, `flops`, `seconds`) to x values."""

    axes: dict[str, tuple[float, ...]]
    values: tuple[float | None, ...]


class CellRecord(Record):
    """One arm × seed. A failed cell stays in the record with its error."""

    arm: str
    seed: int
    status: Literal["done", "failed", "missing"]
    error: str = ""
    fingerprint: str = ""
    metrics: dict[str, float] = {}
    series: dict[str, Series] = {}
    seconds: float | None = None
    tokens: int | None = None
    flops: float | None = None
    peak_bytes: int | None = None


class Pair(Record):
    """One paired contrast: a seed or an item (cluster) seen by both arms."""

    unit: str
    baseline: float
    arm: float
    contrast: float


class Verdict(Record):
    """What the cells say of one claim."""

    claim: str = Field(description="identifier inside the study")
    sentence: str
    metric: str
    arm: str
    baseline: str
    contrast: Literal["difference", "log ratio"]
    direction: Literal["greater", "less"]
    margin: float
    status: Status
    effect: float | None = None
    interval: Interval | None = None
    n: int
    unit_of_n: str = "seeds"
    mde_before: float | None = Field(default=None, description="minimum detectable effect as designed")
    mde_after: float | None = Field(default=None, description="minimum detectable effect from the observed spread")
    n_needed: int | None = Field(default=None, description="units that would decide an inconclusive verdict")
    pairs: tuple[Pair, ...] = ()
    reason: str = ""
    looks: tuple[dict[str, Any], ...] = Field(default=(), description="sequential design: one entry per look")


class Table(Record):
    """A table for the report; cells are strings, numbers or null."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    note: str = ""


class Line(Record):
    """One line of a figure with an optional band."""

    name: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] | None = None
    high: tuple[float | None, ...] | None = None


class Figure(Record):
    """A line chart of the study's own (pass@C against budget, λ per layer)."""

    title: str
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    lines: tuple[Line, ...]
    note: str = ""


class PaperFigure(Record):
    """A number that the paper reports, beside ours where the study measures it."""

    setting: str
    paper: str
    ours: str = ""
    note: str = ""


class Result(Record):
    """Everything that a report needs and a reader can check."""

    schema_version: int = SCHEMA_VERSION
    title: str
    question: str = ""
    slug: str | None = Field(default=None, description="method slug of a study; null for `compare`")
    scale: str = ""
    design: str = Field(default="", description="one paragraph: pairing, seeds, interval, sequential rule")
    fingerprint: str
    created: str = Field(description="UTC, ISO 8601")
    command: str = ""
    baseline: str
    metrics: tuple[Metric, ...]
    arms: tuple[ArmRecord, ...]
    cells: tuple[CellRecord, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    paper: tuple[PaperFigure, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="honest small print: shared rate, generated data, …")
    environment: dict[str, str] = {}
    recipe_yaml: str = ""
