"""Sample kinds, so that the tests of recipes say nothing about real models: two mixers, two positions, two
schedules…"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from torchstone.recipe import registry
from torchstone.recipe.load import load_recipe
from torchstone.recipe.part import Part
from torchstone.recipe.registry import part_field
from torchstone.recipe.schema import Recipe, Section


class WavePosition(Part):
    """Turns by angle. Second sentence."""

    family: ClassVar[str] = "position"
    kind: Literal["t-wave"] = "t-wave"
    base: float = Field(default=10000.0, gt=0, description="slowest wavelength")


class StillPosition(Part):
    """Says nothing of place."""

    family: ClassVar[str] = "position"
    kind: Literal["t-still"] = "t-still"


class AlphaMixer(Part):
    """The baseline mixer."""

    family: ClassVar[str] = "mixer"
    kind: Literal["t-alpha"] = "t-alpha"
    heads: int | None = Field(default=None, gt=0, description="number of heads")
    window: int | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    position: part_field("position") = {"kind": "t-wave"}


class BetaMixer(Part):
    """Another mixer, which counts heads in pairs."""

    family: ClassVar[str] = "mixer"
    kind: Literal["t-beta"] = "t-beta"
    version: Literal["v1", "v2"] = "v1"
    heads: int | None = Field(default=None, gt=0)
    lambda_init: Literal["schedule"] | float = "schedule"
    position: part_field("position") = {"kind": "t-still"}

    @classmethod
    def inherit(cls, previous: Mapping[str, Any]) -> dict[str, Any]:
        kept = super().inherit(previous)
        if previous["kind"] == "t-alpha" and kept.get("heads"):
            kept["heads"] = kept["heads"] // 2
        return kept


class Block(Section):
    mixer: part_field("mixer") = {"kind": "t-alpha"}
    extra: part_field("mixer") | None = None


class SampleModel(Part):
    """A model of blocks."""

    family: ClassVar[str] = "model"
    kind: Literal["t-model"] = "t-model"
    width: int = Field(gt=0, description="model width")
    depth: int = Field(default=2, gt=0)
    block: Block = Field(default_factory=Block)
    pattern: tuple[part_field("mixer"), ...] = ()


class SampleData(Part):
    """Data."""

    family: ClassVar[str] = "data"
    kind: Literal["t-data"] = "t-data"
    paths: tuple[str, ...] = ()
    options: dict[str, Any] = {}


class SampleOptimizer(Part):
    """An optimizer."""

    family: ClassVar[str] = "optimizer"
    kind: Literal["t-opt"] = "t-opt"
    learning_rate: float = Field(default=3e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = False


class FlatSchedule(Part):
    """A schedule."""

    family: ClassVar[str] = "schedule"
    kind: Literal["t-flat"] = "t-flat"
    warmup: float = Field(default=0.05, ge=0)


class SampleObjective(Part):
    """An objective."""

    family: ClassVar[str] = "objective"
    kind: Literal["t-next"] = "t-next"


SAMPLES = (
    WavePosition,
    StillPosition,
    AlphaMixer,
    BetaMixer,
    SampleModel,
    SampleData,
    SampleOptimizer,
    FlatSchedule,
    SampleObjective,
)

BASE = """\
model:
  kind: t-model
  width: 64
  block:
    mixer: {kind: t-alpha, heads: 8, position: {kind: t-wave, base: 500}}
data: t-data
objective: t-next
optimizer: {kind: t-opt}
schedule: t-flat
budget: {tokens: 500000}
"""


@pytest.fixture(scope="module", autouse=True)
def sample_kinds() -> Iterator[None]:
    added = {(cls.family, cls.model_fields["kind"].default): cls for cls in SAMPLES}
    registry._registered.update(added)
    yield
    for key in added:
        del registry._registered[key]


@pytest.fixture
def base(sample_kinds: None) -> Recipe:
    return load_recipe(BASE)


@pytest.fixture
def base_yaml() -> str:
    return BASE
