"""Recipe: everything that defines one training run, as data.

`model, data, data_phases, objective, optimizer, schedule, budget, batch, precision, compile, evaluation, checkpoint,
sinks, seed`. Frozen and strict: an unknown key is an error. Operational keys (checkpoint, sinks) do not
change what is computed and stay out of the fingerprint; see `torchstone.recipe.fingerprint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from torchstone.recipe.part import Part, Strict
from torchstone.recipe.registry import part_field


class Section(Strict):
    """A fixed (not swappable) block of a recipe.

    Some sections may also be written as one plain value: `plain_form` says which, and `opened` what it stands for.
    """

    plain_form: ClassVar[str] = ""

    @classmethod
    def opened(cls, data: Any) -> Any:
        """The mapping that a plain value stands for; anything else as it is."""
        return data

    @classmethod
    def merge(cls, previous: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Plain data of the section after an override gives some of its keys; the other keys stay."""
        return {**previous, **given}


class Budget(Section):
    """How long to train, in exactly one unit.

    `tokens`: training tokens · `flops`: training FLOPs (forward and backward) · `steps`: optimizer updates ·
    `tokens_per_parameter`: tokens per non-embedding parameter. All but `steps` are rounded up to whole steps.
    """

    tokens: int | None = Field(default=None, gt=0, description="training tokens")
    flops: float | None = Field(default=None, gt=0, description="training FLOPs, forward and backward")
    steps: int | None = Field(default=None, gt=0, description="optimizer updates")
    tokens_per_parameter: float | None = Field(
        default=None, gt=0, description="training tokens per non-embedding parameter"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "a budget has exactly one of tokens, flops, steps, tokens_per_parameter; "
                f"given: {', '.join(given) or 'none'}"
            )
        return self

    @classmethod
    def merge(cls, previous: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """A budget in another unit replaces the one before it."""
        return dict(given)

    @property
    def unit(self) -> str:
        """Name of the unit that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


class Batch(Section):
    """Sequences per optimizer update, and per forward pass on each process."""

    sequences: int = Field(default=32, gt=0, description="global batch: sequences per update over all processes")
    micro: int | None = Field(
        default=None, gt=0, description="sequences per forward pass and process; null: all at once"
    )


class Evaluation(Section):
    """Held-out loss during and after training; never advances a training stream."""

    every: int | None = Field(default=100, gt=0, description="steps between evaluations; null: only at the end")
    sequences: int = Field(default=64, gt=0, description="held-out sequences per evaluation")


class Checkpoint(Section):
    """When to save and how many complete checkpoints to keep."""

    every: int | None = Field(default=None, gt=0, description="steps between saves; null: at the end and on a signal")
    keep: int = Field(
        default=2, gt=0, description="newest complete checkpoints kept; ends of decays and cycles are kept besides"
    )


class Recipe(Section):
    """One training run as data. See `recipes/tiny.yaml` for every key with a comment."""

    model: part_field("model")  # type: ignore[valid-type]
    data: part_field("data")  # type: ignore[valid-type]
    data_phases: dict[str, tuple[float, ...]] = Field(
        default={},
        description="shares of a mixture's sources in a stage of the schedule; stages not named keep data.shares",
    )
    objective: part_field("objective") = {"kind": "next-token"}  # type: ignore[valid-type]
    optimizer: part_field("optimizer") = {"kind": "adamw"}  # type: ignore[valid-type]
    schedule: part_field("schedule") = {"kind": "cosine"}  # type: ignore[valid-type]
    budget: Budget
    batch: Batch = Batch()
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="arithmetic of the forward and backward pass; auto measures which is faster",
    )
    compile: Literal["auto"] | bool = Field(
        default="auto", description="torch.compile; auto measures whether it pays for this run's length"
    )
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="where metrics go beside the run directory's own metrics.jsonl"
    )
    seed: int = Field(default=0, ge=0, description="names every random stream: initialisation, data order, dropout")

    @field_validator("data_phases")
    @classmethod
    def _fit_the_mixture(
        cls, phases: dict[str, tuple[float, ...]], info: ValidationInfo
    ) -> dict[str, tuple[float, ...]]:
        data = info.data.get("data")
        if not phases or data is None:
            return phases
        if not hasattr(data, "check_phase"):
            raise ValueError(
                f"the data is of the kind {data.kind}, and phases are shares of a mixture's sources; use data.kind mixture, or "
                "leave data_phases empty"
            )
        for stage, shares in phases.items():
            data.check_phase(stage, shares)
        return phases

    def data_dict(self) -> dict[str, Any]:
        """Plain data (what YAML holds), complete with every default."""
        return self.model_dump(mode="json")


__all__ = ["Batch", "Budget", "Checkpoint", "Evaluation", "Part", "Recipe", "Section"]
